"""Texts, or pairs of them, as `encode` calls, and the rows that come back. No I/O.

Many texts become several calls, each small enough for the wire; `encoded` is a flow that makes them one after
the other. What is too long is an error, or is cut where somebody asks for that: never silently.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from llmasos.syscalls import errors, table
from llmasos.syscalls import types as t
from msgspec.structs import replace

from .flow import Do, Flow
from .tokenizer import Framed, Tokenizer

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

Texts = str | Sequence[str | tuple[str, str]]

CALL_TEXTS = 256
CALL_TOKENS = 1 << 16
"""A call has no more: a quarter of what the wire takes, so that replies are bounded too."""


def framed(tokenizer: Tokenizer, texts: Texts, context_length: int, truncate: bool) -> list[Framed]:
    """Texts as the model wants them. Raises ContextOverflow for what is too long unless it is to be cut at
    its end, InvalidArgument for what is neither a text nor a pair, and where nothing is left of a text."""
    if not isinstance(texts, Iterable) or isinstance(texts, bytes):
        raise errors.InvalidArgument(f"texts are a list, not {type(texts).__name__}", field="texts")
    listed = [texts] if isinstance(texts, str) else list(texts)
    for index, text in enumerate(listed):
        if isinstance(text, tuple | list) and len(text) != 2:
            raise errors.InvalidArgument(f"text {index} is no pair: it has {len(text)} parts", field="texts")
    found = tokenizer.frame(listed, context_length if truncate else None)
    for index, one in enumerate(found):
        if not one.ids:
            raise errors.InvalidArgument(f"text {index} is empty", field="texts")
        if len(one.ids) > context_length:
            raise errors.ContextOverflow(
                f"text {index} has {len(one.ids)} tokens, the model's context is {context_length}",
                hint="cut it in pieces, or pass truncate=True",
                context_length=context_length,
                tokens=len(one.ids),
                index=index,
            )
    return found


def calls(call: table.Encode, texts: Sequence[Framed]) -> Iterator[table.Encode]:
    """`call` for all texts, as many times as it takes."""
    first = 0
    while first < len(texts):
        end, tokens = first, 0
        while end < min(len(texts), first + CALL_TEXTS) and (
            end == first or tokens + len(texts[end].ids) <= CALL_TOKENS
        ):
            tokens += len(texts[end].ids)
            end += 1
        part = texts[first:end]
        yield replace(
            call,
            tokens=t.pack_tokens(id_ for one in part for id_ in one.ids),
            lengths=[len(one.ids) for one in part],
            pairs=[one.second for one in part] if any(one.second for one in part) else [],
        )
        first = end


def rows(reply: table.EncodeReply) -> Floats:
    """[rows, width] of a reply."""
    import numpy as np

    return np.frombuffer(reply.data, "<f4").astype(np.float32, copy=False).reshape(-1, reply.width)


def encoded(call: table.Encode, texts: Sequence[Framed]) -> Flow[Floats]:
    """Rows of all texts; [0, 0] of none."""
    import numpy as np

    replies: list[Any] = []
    for one in calls(call, texts):
        replies.append(rows((yield Do(one))))
    return np.concatenate(replies) if replies else np.zeros((0, 0), np.float32)

"""Texts as vectors, or as an encoder's scores, for every API that has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llmasos.syscalls import errors, table
from llmasos.syscalls import types as t

from ..encoding import Texts, calls, framed, rows
from ..llm import LLM
from ..tokenizer import Framed
from . import record
from .callers import Caller
from .http import aside
from .options import Placed

if TYPE_CHECKING:
    from ..encoding import Floats


async def framed_texts(llm: LLM, texts: Texts, *, truncate: bool | None = None) -> list[Framed]:
    """Texts, or pairs of them, with the model's special tokens. `truncate` None: the API cannot ask for it.
    Raises ContextOverflow, InvalidArgument."""
    try:
        return await aside(lambda: framed(llm.tokenizer, texts, llm.context_length, truncate or False))
    except errors.ContextOverflow as problem:
        if truncate is None:
            problem.hint = "cut it in pieces"
        raise


async def vectors(
    caller: Caller,
    llm: LLM,
    texts: Sequence[Framed],
    body: Placed,
    encodes: t.Encodes = t.Encodes.EMBED,
) -> tuple[list[Floats], int]:
    """Rows of all texts, in parts, and how many tokens they had. Raises UnsupportedModel for a model that
    does not encode to that."""
    sched_class, nice = body.place()
    call = table.Encode(llm.model, encodes, sched_class=sched_class, nice=nice, deadline_ms=body.deadline_ms)
    replies = [await caller.aio.call(one) for one in calls(call, texts)]
    tokens = sum(reply.tokens for reply in replies)
    if (request := record.current()) is not None:
        request.used(llm.model, tokens, 0, 0, "stop")
    return [rows(reply) for reply in replies], tokens


def shortened(made: Floats, dimensions: int) -> Any:
    """The first `dimensions` of vectors [n, width], normalised again. Raises InvalidArgument."""
    import numpy as np

    if dimensions > made.shape[1]:
        raise errors.InvalidArgument(
            f"the model's vectors have {made.shape[1]} dimensions", field="dimensions"
        )
    kept = made[:, :dimensions]
    lengths = np.linalg.norm(kept, axis=1, keepdims=True)
    return kept / np.where(lengths > 0, lengths, 1)

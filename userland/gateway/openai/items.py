"""Items of a conversation, as /v1/responses takes and gives them, and what they are to a chat template."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal, cast

from llmasos.syscalls import errors
from pydantic import Discriminator, Field, Tag

from ..http import new_id
from ..options import Body
from .messages import TextPart

Status = Literal["in_progress", "completed", "incomplete"]
Id = Annotated[str, Field(max_length=128)]


class OutputPart(Body):
    """A text that a model wrote, sent back. What was told beside it changes nothing."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None
    parsed: Any = Field(None, description="OpenAI's client adds it; it changes nothing.")


class MessageItem(Body):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart | OutputPart]
    id: Id | None = None
    status: Status | None = None
    phase: Literal["commentary", "final_answer"] | None = None


class CallItem(Body):
    """A call of a function that the model asked for. `arguments` is JSON."""

    NOT_DONE = {"async": (False,), "caller": (), "namespace": ()}

    type: Literal["function_call"]
    call_id: Id
    name: str = Field(max_length=256)
    arguments: str
    parsed_arguments: Any = Field(None, description="OpenAI's client adds it; it changes nothing.")
    id: Id | None = None
    status: Status | None = None


class CallOutputItem(Body):
    """What came of it."""

    type: Literal["function_call_output"]
    call_id: Id
    output: str | list[TextPart]
    id: Id | None = None
    status: Status | None = None


class ReferenceItem(Body):
    """An item of a response that was stored."""

    type: Literal["item_reference"]
    id: Id


def _kind(item: Any) -> Any:
    given = item.get("type") if isinstance(item, dict) else getattr(item, "type", None)
    return "message" if given is None else given


Item = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[CallOutputItem, Tag("function_call_output")]
    | Annotated[ReferenceItem, Tag("item_reference")],
    Discriminator(_kind),
]

_BESIDE = ("parsed", "annotations", "logprobs")
_ADDED: Any = {"parsed_arguments": True, "content": {"__all__": dict.fromkeys(_BESIDE, True)}}
PREFIXES = {"message": "msg_", "function_call": "fc_", "function_call_output": "fco_"}


_OF_RESPONSE = re.compile(r"(?:msg|fc)_([0-9a-f]{32})[0-9a-f]{4,8}")


def item_id(prefix: str, response_id: str, place: int) -> str:
    """Of an item of that response's output. It tells where the item is kept."""
    return f"{prefix}{response_id.removeprefix('resp_')}{place:04x}"


def response_of(item: str) -> str | None:
    """The response that an item with this id is of; None if it can be of none."""
    found = _OF_RESPONSE.fullmatch(item)
    return f"resp_{found[1]}" if found else None


def shown(items: str | list[Item]) -> list[dict[str, Any]]:
    """The input as it is kept and shown, but for references: each item with an id, texts as parts."""
    if isinstance(items, str):
        items = [MessageItem(role="user", content=items)]
    found = []
    for item in items:
        made = item.model_dump(exclude_none=True, exclude=_ADDED)
        if isinstance(item, MessageItem) and isinstance(item.content, str):
            kind = "output_text" if item.role == "assistant" else "input_text"
            made["content"] = [{"type": kind, "text": item.content}]
        for part in made["content"] if isinstance(item, MessageItem) else ():
            if part["type"] == "output_text":
                part["annotations"] = []
        found.append({**made, "id": item.id or new_id(PREFIXES[item.type]), "status": "completed"})
    return found


def as_messages(items: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The conversation that `shown` items (or a response's output) are, as chat templates take it: calls that
    follow each other are one message. Raises InvalidArgument for what came of a call that nobody made."""
    found: list[dict[str, Any]] = []
    called: set[str] = set()
    for item in items:
        match item["type"]:
            case "message":
                role = {"developer": "system"}.get(item["role"], item["role"])
                found.append({"role": role, "content": _text(item["content"])})
            case "function_call":
                call = {
                    "id": item["call_id"],
                    "type": "function",
                    "function": {"name": item["name"], "arguments": item["arguments"]},
                }
                if not found or found[-1]["role"] != "assistant":
                    found.append({"role": "assistant", "content": ""})
                cast(list[Any], found[-1].setdefault("tool_calls", [])).append(call)
                called.add(item["call_id"])
            case "function_call_output":
                if item["call_id"] not in called:
                    raise errors.InvalidArgument(
                        f"No function call found for the output with call_id {item['call_id']!r}.",
                        hint="send the call, too, or the previous_response_id",
                        field="input",
                    )
                content = _text(item["output"])
                found.append({"role": "tool", "tool_call_id": item["call_id"], "content": content})
    return found


def _text(content: str | list[dict[str, Any]]) -> str:
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)

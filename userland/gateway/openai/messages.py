"""Messages of a conversation as OpenAI's clients send them, and as chat templates take them."""

from __future__ import annotations

from typing import Any, Literal

from llmasos.syscalls import errors
from pydantic import Field

from ..options import Body

_ROLES = {"developer": "system", "function": "tool"}
_ADDED: dict[str, Any] = {"index": True, "function": {"parsed_arguments": True}}


class TextPart(Body):
    type: Literal["text", "input_text", "output_text"]
    text: str


class CalledFunction(Body):
    name: str = Field(min_length=1, max_length=128)
    arguments: str = Field(description="JSON.")
    parsed_arguments: Any = Field(None, description="OpenAI's client adds it; it changes nothing.")


class ToolCall(Body):
    """A call that the model asked for, sent back."""

    id: str = Field(max_length=128)
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


class Message(Body):
    """`content` is a text or text parts; pictures and sound are refused."""

    NOT_DONE = {"annotations": ([],), "audio": (), "function_call": (), "refusal": ()}

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[TextPart] | None = None
    name: str | None = Field(None, max_length=256)
    tool_calls: list[ToolCall] | None = Field(None, max_length=128)
    tool_call_id: str | None = Field(None, max_length=128)
    parsed: Any = Field(None, description="OpenAI's client adds it; it changes nothing.")

    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


def as_messages(messages: list[Message]) -> list[dict[str, Any]]:
    """What templates take: `developer` is what they call `system`, `function` what they call `tool`. Raises
    InvalidArgument."""
    if not messages:
        raise errors.InvalidArgument("messages is empty", field="messages")
    found: list[dict[str, Any]] = []
    for message in messages:
        made: dict[str, Any] = {"role": _ROLES.get(message.role, message.role), "content": message.text()}
        if message.tool_calls and message.role == "assistant":
            made["tool_calls"] = [call.model_dump(exclude=_ADDED) for call in message.tool_calls]
        if made["role"] == "tool":
            known = {"tool_call_id": message.tool_call_id, "name": message.name}
            made |= {key: value for key, value in known.items() if value is not None}
        found.append(made)
    return found

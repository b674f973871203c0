"""Messages of a conversation as OpenAI's clients send them, and as chat templates take them."""

from __future__ import annotations

from typing import Any, Literal

from llmasos.syscalls import errors
from pydantic import Field

from ..options import Body


class TextPart(Body):
    type: Literal["text", "input_text", "output_text"]
    text: str


class Message(Body):
    """`content` is a text or text parts; pictures and sound are refused."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[TextPart] | None = None
    name: str | None = Field(None, max_length=256)

    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


def as_messages(messages: list[Message]) -> list[dict[str, Any]]:
    """What templates take: `developer` is what they call `system`. Raises InvalidArgument."""
    if not messages:
        raise errors.InvalidArgument("messages is empty", field="messages")
    return [{"role": "system" if m.role == "developer" else m.role, "content": m.text()} for m in messages]

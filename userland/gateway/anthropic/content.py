"""Messages of a conversation as Anthropic's clients send them, and as chat templates take them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from ..options import Body


class CacheControl(Body):
    """Accepted everywhere: the kernel shares equal beginnings anyway."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class TextBlock(Body):
    NOT_DONE = {"citations": ([],)}

    type: Literal["text"]
    text: str
    cache_control: CacheControl | None = None


def _kind(value: Any) -> str:
    return "text" if isinstance(value, str) else "blocks"


Text = Annotated[
    Annotated[str, Tag("text")] | Annotated[list[TextBlock], Field(max_length=4096), Tag("blocks")],
    Discriminator(_kind),
]


class Message(Body):
    role: Literal["user", "assistant", "system"]
    content: Text


def text_of(content: str | list[TextBlock]) -> str:
    """Blocks are paragraphs."""
    return content if isinstance(content, str) else "\n".join(block.text for block in content)


def as_messages(system: str | list[TextBlock] | None, messages: list[Message]) -> list[dict[str, Any]]:
    """What templates take. Turns of one role that follow each other are one turn."""
    found: list[dict[str, Any]] = []
    if system:
        found.append({"role": "system", "content": text_of(system)})
    for message in messages:
        text = text_of(message.content)
        if found and found[-1]["role"] == message.role:
            found[-1]["content"] += "\n" + text
        else:
            found.append({"role": message.role, "content": text})
    return found

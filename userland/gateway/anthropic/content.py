"""Messages and tools as Anthropic's clients send them, and as chat templates take them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from llmasos.syscalls import errors
from pydantic import Discriminator, Field, Tag

from ...tools import Tool, Toolbox
from ..options import Body

Id = Annotated[str, Field(min_length=1, max_length=128)]


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
    """What is wrong with a block is then told of the block, not of the text that it might have been."""
    return "text" if isinstance(value, str) else "blocks"


Text = Annotated[
    Annotated[str, Tag("text")] | Annotated[list[TextBlock], Field(max_length=4096), Tag("blocks")],
    Discriminator(_kind),
]


class ToolUse(Body):
    """A call that the model asked for, sent back."""

    NOT_DONE = {"caller": ({"type": "direct"},), "toolset_name": ()}

    type: Literal["tool_use"]
    id: Id
    name: str = Field(min_length=1, max_length=128)
    input: dict[str, Any]
    cache_control: CacheControl | None = None


class ToolResult(Body):
    NOT_DONE = {"toolset_name": ()}

    type: Literal["tool_result"]
    tool_use_id: Id
    content: Text = ""
    is_error: bool = False
    cache_control: CacheControl | None = None


Block = Annotated[TextBlock | ToolUse | ToolResult, Field(discriminator="type")]


class Message(Body):
    """Pictures, documents and thoughts are refused."""

    role: Literal["user", "assistant", "system"]
    content: Annotated[
        Annotated[str, Tag("text")] | Annotated[list[Block], Field(max_length=4096), Tag("blocks")],
        Discriminator(_kind),
    ]


def as_messages(system: str | list[TextBlock] | None, messages: list[Message]) -> list[dict[str, Any]]:
    """What templates take. Turns of one role that follow each other are one turn. Raises InvalidArgument."""
    found: list[dict[str, Any]] = []
    names: dict[str, str] = {}
    if system:
        found.append({"role": "system", "content": _text(system)})
    for place, message in enumerate(messages):
        said: list[str] = []
        calls: list[dict[str, Any]] = []
        for block in [message.content] if isinstance(message.content, str) else message.content:
            match block:
                case str():
                    said.append(block)
                case TextBlock():
                    said.append(block.text)
                case ToolUse():
                    _belongs(message, place, "assistant", "tool_use")
                    names[block.id] = block.name
                    function = {"name": block.name, "arguments": block.input}
                    calls.append({"id": block.id, "type": "function", "function": function})
                case ToolResult():
                    _belongs(message, place, "user", "tool_result")
                    found.append(_result(block, names, place))
        made: dict[str, Any] = {"role": message.role, "content": "\n".join(said)}
        if calls:
            made["tool_calls"] = calls
        _add(found, made, bool(said))
    return found


def _add(found: list[dict[str, Any]], made: dict[str, Any], spoken: bool) -> None:
    last = found[-1] if found else {}
    if not spoken and "tool_calls" not in made:
        return
    if last.get("role") != made["role"]:
        found.append(made)
        return
    last["content"] = "\n".join(text for text in (last["content"], made["content"]) if text)
    if "tool_calls" in made:
        last["tool_calls"] = [*last.get("tool_calls", []), *made["tool_calls"]]


def _text(content: str | list[TextBlock]) -> str:
    """Blocks are paragraphs."""
    return content if isinstance(content, str) else "\n".join(block.text for block in content)


def _belongs(message: Message, place: int, role: str, kind: str) -> None:
    if message.role != role:
        raise errors.InvalidArgument(
            f"messages.{place}: `{kind}` blocks can only be in `{role}` messages", field="messages"
        )


def _result(block: ToolResult, names: dict[str, str], place: int) -> dict[str, Any]:
    if block.tool_use_id not in names:
        raise errors.InvalidArgument(
            f"messages.{place}: no `tool_use` before it has the id {block.tool_use_id!r}", field="messages"
        )
    text = _text(block.content)
    return {
        "role": "tool",
        "content": f"Error: {text}" if block.is_error else text,
        "tool_call_id": block.tool_use_id,
        "name": names[block.tool_use_id],
    }


class ToolParam(Body):
    """A tool of the caller's. Tools that Anthropic runs itself are refused."""

    NOT_DONE = {
        "allowed_callers": (["direct"],),
        "defer_loading": (False,),
        "input_examples": ([],),
    }

    type: Literal["custom"] = "custom"
    name: str
    description: str = ""
    input_schema: dict[str, Any]
    strict: bool = False
    cache_control: CacheControl | None = None
    eager_input_streaming: bool | None = Field(None, description="Input is always streamed as it comes.")


class ToolChoice(Body):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


def toolbox_of(tools: list[ToolParam] | None, choice: ToolChoice | None) -> Toolbox | None:
    """None: nothing may be called. Raises InvalidArgument."""
    choice = choice or ToolChoice(type="auto")
    if (choice.name is not None) != (choice.type == "tool"):
        raise errors.InvalidArgument("tool_choice: `tool` has a name, nothing else has", field="tool_choice")
    if choice.type in ("any", "tool") and not tools:
        raise errors.InvalidArgument("tool_choice needs tools", field="tool_choice")
    if not tools or choice.type == "none":
        return None
    return Toolbox(
        [Tool(tool.name, tool.description, tool.input_schema, tool.strict) for tool in tools],
        None if choice.name is None else frozenset({choice.name}),
        choice.type in ("any", "tool"),
        not choice.disable_parallel_tool_use,
    )

"""What holds an answer to a form, as OpenAI's clients say it: its format, and the tools that it may call."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from ...tools import MOST_TOOLS, Toolbox
from ..options import Body

Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


class JsonSchema(Body):
    """`strict` or not, the answer matches."""

    name: Name
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Function(Body):
    """`strict`: a schema with keywords that the answer cannot be held to is refused, else they are passed
    over."""

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="JSON schema of an object.")
    strict: bool | None = None


class FunctionTool(Body):
    type: Literal["function"]
    function: Function


class FunctionName(Body):
    name: Name


class NamedTool(Body):
    type: Literal["function"]
    function: FunctionName


class AllowedTools(Body):
    mode: Literal["auto", "required"]
    tools: list[NamedTool] = Field(min_length=1, max_length=MOST_TOOLS)


class SomeTools(Body):
    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


class Constrained(Body):
    """Options of requests whose answers may be calls."""

    response_format: ResponseFormat | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | SomeTools | None = None
    parallel_tool_calls: bool | None = None

    def toolbox(self) -> Toolbox | None:
        """Raises InvalidArgument."""
        choice = self.tool_choice.model_dump() if isinstance(self.tool_choice, Body) else self.tool_choice
        tools = [tool.model_dump(exclude_none=True) for tool in self.tools or ()]
        return Toolbox.from_openai(tools, choice, self.parallel_tool_calls is not False)


# Responses say the same with fewer braces.


class FlatFormat(Body):
    type: Literal["text", "json_object", "json_schema"] = "text"
    name: Name | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.type == "json_schema" and (self.name is None or self.schema_ is None):
            raise ValueError("json_schema needs name and schema")
        return self


class FlatTool(Function):
    NOT_DONE = {
        "allowed_callers": (["direct"],),
        "async": (False,),
        "defer_loading": (False,),
        "output_schema": (),
    }

    type: Literal["function"]


class FlatName(FunctionName):
    type: Literal["function"]


class FlatChoice(Body):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[FlatName] = Field(min_length=1, max_length=MOST_TOOLS)


class FlatText(Body):
    NOT_DONE = {"verbosity": ("medium",)}

    format: FlatFormat | None = None


class FlatlyConstrained(Body):
    """Options of responses."""

    text: FlatText | None = None
    tools: Annotated[list[FlatTool], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | FlatName | FlatChoice | None = None
    parallel_tool_calls: bool | None = None

    @property
    def format(self) -> dict[str, Any]:
        """As it is shown, and as `grammar_of` takes it."""
        chosen = self.text.format if self.text else None
        return chosen.model_dump(by_alias=True, exclude_none=True) if chosen else {"type": "text"}

    def toolbox(self) -> Toolbox | None:
        """Raises InvalidArgument."""
        choice: Any = self.tool_choice
        if isinstance(choice, FlatName):
            choice = _nested(choice)
        elif isinstance(choice, FlatChoice):
            named = [_nested(tool) for tool in choice.tools]
            choice = {"type": choice.type, "allowed_tools": {"mode": choice.mode, "tools": named}}
        tools = [_nested(tool) for tool in self.tools or ()]
        return Toolbox.from_openai(tools, choice, self.parallel_tool_calls is not False)


def _nested(function: FlatTool | FlatName) -> dict[str, Any]:
    return {"type": "function", "function": function.model_dump(exclude={"type"}, exclude_none=True)}

"""What holds an answer to a form, as OpenAI's clients say it: its format, and the tools that it may call."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

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

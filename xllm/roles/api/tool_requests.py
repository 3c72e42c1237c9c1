"""What a chat request says of tools."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from xllm.errors import InvalidRequest
from xllm.roles.api.base_model import ApiModel
from xllm.roles.api.reading.calls import NO_PARAMETERS, Tool

MAX_TOOLS = 512


class FunctionDefinition(ApiModel):
    name: str = Field(min_length=1, max_length=128)
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="A JSON schema.")
    strict: bool | None = None


class ToolDefinition(ApiModel):
    type: Literal["function"] = "function"
    function: FunctionDefinition


class FunctionName(ApiModel):
    name: str


class NamedTool(ApiModel):
    type: Literal["function"] = "function"
    function: FunctionName


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("<word>")]
    | Annotated[NamedTool, Tag("<tool>")],
    Discriminator(lambda value: "<word>" if isinstance(value, str) else "<tool>"),
]


class ToolFields(ApiModel):
    """The fields of a request."""

    tools: list[ToolDefinition] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: ToolChoice | None = Field(
        None, description="auto if left out where there are tools; a tool by name calls that."
    )
    parallel_tool_calls: bool | None = Field(None, description="False: at most one call.")

    @property
    def offered_tools(self) -> list[Tool]:
        """Those that the answer may call."""
        if self.tool_choice == "none":
            return []
        return [
            Tool(
                tool.function.name,
                NO_PARAMETERS if tool.function.parameters is None else tool.function.parameters,
            )
            for tool in self.tools or ()
        ]

    def forced_tools(self) -> list[Tool]:
        """Of which one has to be called; empty: that is up to the model. Raises: InvalidRequest."""
        choice = self.tool_choice
        if choice is None or choice in ("none", "auto"):
            return []
        if not self.tools:
            raise InvalidRequest(
                "tool_choice wants a tool, but there are none", param="tool_choice"
            )
        if not isinstance(choice, NamedTool):
            return self.offered_tools
        named = [tool for tool in self.offered_tools if tool.name == choice.function.name]
        if not named:
            raise InvalidRequest(
                f"tool_choice names {choice.function.name!r}, which is none of the tools",
                param="tool_choice.function.name",
            )
        return named[:1]

    @property
    def names_a_tool(self) -> bool:
        return isinstance(self.tool_choice, NamedTool)

    @property
    def template_tools(self) -> list[dict[str, Any]]:
        """As chat templates expect them."""
        if self.tool_choice == "none":
            return []
        return [tool.model_dump(exclude_none=True) for tool in self.tools or ()]

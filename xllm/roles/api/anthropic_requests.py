"""Bodies of Anthropic's /v1/messages, and how they translate to a chat.

system              a system message
tool_use            a tool call of an assistant message
tool_result         a tool message of its own, before the rest of the user's
output_format       response_format
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag

from xllm.errors import InvalidRequest
from xllm.roles.api.base_model import ApiModel
from xllm.roles.api.body import as_chat_request
from xllm.roles.api.requests import MAX_STOPS, ChatCompletionRequest, StopString
from xllm.roles.api.tool_requests import MAX_TOOLS

_MAX_INT32 = 2**31 - 1


class TextBlock(ApiModel):
    type: Literal["text"]
    text: str


class ThinkingBlock(ApiModel):
    type: Literal["thinking"]
    thinking: str


class RedactedThinkingBlock(ApiModel):
    type: Literal["redacted_thinking"]


class ToolUseBlock(ApiModel):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


TextBlocks = Annotated[list[TextBlock], Field(fail_fast=True)]
Texts = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[TextBlocks, Tag("<blocks>")],
    Discriminator(lambda value: "<text>" if isinstance(value, str) else "<blocks>"),
]


class ToolResultBlock(ApiModel):
    type: Literal["tool_result"]
    tool_use_id: str
    content: Texts | None = None
    is_error: bool | None = None


_BLOCKS = ("text", "thinking", "redacted_thinking", "tool_use", "tool_result")


def _block_kind(value: Any) -> str | None:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return f"<{kind}>" if kind in _BLOCKS else None


Block = Annotated[
    Annotated[TextBlock, Tag("<text>")]
    | Annotated[ThinkingBlock, Tag("<thinking>")]
    | Annotated[RedactedThinkingBlock, Tag("<redacted_thinking>")]
    | Annotated[ToolUseBlock, Tag("<tool_use>")]
    | Annotated[ToolResultBlock, Tag("<tool_result>")],
    Discriminator(
        _block_kind,
        custom_error_type="block_type",
        custom_error_message=f"type must be one of {', '.join(_BLOCKS)}",
    ),
]


class InputMessage(ApiModel):
    role: Literal["user", "assistant"]
    content: Annotated[
        Annotated[str, Tag("<text>")]
        | Annotated[list[Block], Field(fail_fast=True), Tag("<blocks>")],
        Discriminator(lambda value: "<text>" if isinstance(value, str) else "<blocks>"),
    ]


class MessagesTool(ApiModel):
    type: Literal["custom"] | None = None
    name: str = Field(min_length=1, max_length=128)
    description: str | None = None
    input_schema: dict[str, Any]


class MessagesToolChoice(ApiModel):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = Field(None, description="Of the tool that is to be called.")
    disable_parallel_tool_use: bool | None = None


class OutputFormat(ApiModel):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(ApiModel):
    format: OutputFormat | None = None


class CountTokensRequest(ApiModel):
    """Body of /v1/messages/count_tokens."""

    model_config = ConfigDict(extra="allow")

    model: str
    messages: list[InputMessage] = Field(min_length=1)
    system: Texts | None = None
    tools: list[MessagesTool] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: MessagesToolChoice | None = None
    thinking: dict[str, Any] | None = Field(None, description="Up to the model: ignored.")

    def as_chat(self) -> ChatCompletionRequest:
        """The same conversation. Raises: InvalidRequest."""
        return as_chat_request(self._chat_fields(), self.model_extra)

    def _chat_fields(self) -> dict[str, Any]:
        if self.messages[-1].role != "user":
            raise InvalidRequest(
                "messages: the last one must be the user's; answers cannot be begun by the client",
                param="messages",
            )
        system = [{"role": "system", "content": _join(self.system)}] if self.system else []
        messages = [part for message in self.messages for part in _chat_messages(message)]
        fields: dict[str, Any] = {"model": self.model, "messages": system + messages}
        if self.tools:
            fields["tools"] = [_chat_tool(tool) for tool in self.tools]
        if self.tool_choice is not None and (self.tools or self.tool_choice.type != "auto"):
            fields["tool_choice"] = self._chat_tool_choice(self.tool_choice)
            fields["parallel_tool_calls"] = not self.tool_choice.disable_parallel_tool_use
        return fields

    def _chat_tool_choice(self, choice: MessagesToolChoice) -> Any:
        if choice.type != "tool":
            return {"auto": "auto", "any": "required", "none": "none"}[choice.type]
        if choice.name is None:
            raise InvalidRequest("tool_choice.name: required", param="tool_choice.name")
        return {"type": "function", "function": {"name": choice.name}}


class MessagesRequest(CountTokensRequest):
    """Body of /v1/messages."""

    max_tokens: int = Field(ge=1, le=_MAX_INT32)
    temperature: float | None = Field(None, ge=0, le=1)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=0, le=_MAX_INT32)
    stop_sequences: list[StopString] | None = Field(None, max_length=MAX_STOPS)
    stream: bool | None = None
    metadata: dict[str, Any] | None = None
    output_format: OutputFormat | None = None
    output_config: OutputConfig | None = None

    def _chat_fields(self) -> dict[str, Any]:
        fields = super()._chat_fields()
        fields |= {
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "stop": self.stop_sequences,
            "stream": self.stream,
        }
        form = self.output_format or (self.output_config and self.output_config.format)
        if form:
            schema = {"name": "output", "schema": form.schema_}
            fields["response_format"] = {"type": "json_schema", "json_schema": schema}
        return fields


def _join(texts: str | list[TextBlock] | None) -> str:
    if texts is None or isinstance(texts, str):
        return texts or ""
    return "\n".join(block.text for block in texts)


def _chat_tool(tool: MessagesTool) -> dict[str, Any]:
    function = {"name": tool.name, "parameters": tool.input_schema}
    if tool.description is not None:
        function["description"] = tool.description
    return {"type": "function", "function": function}


def _chat_messages(message: InputMessage) -> Iterator[dict[str, Any]]:
    if isinstance(message.content, str):
        yield {"role": message.role, "content": message.content}
        return
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    for block in message.content:
        if isinstance(block, TextBlock):
            texts.append(block.text)
        elif isinstance(block, ThinkingBlock):
            thoughts.append(block.thinking)
        elif isinstance(block, ToolUseBlock):
            function = {"name": block.name, "arguments": json.dumps(block.input)}
            calls.append({"id": block.id, "type": "function", "function": function})
        elif isinstance(block, ToolResultBlock):
            yield {
                "role": "tool",
                "tool_call_id": block.tool_use_id,
                "content": _join(block.content),
            }
    has_results = any(isinstance(block, ToolResultBlock) for block in message.content)
    if not texts and has_results:
        return
    rest: dict[str, Any] = {"role": message.role, "content": "\n".join(texts)}
    if calls:
        rest["tool_calls"] = calls
    if thoughts:
        rest["reasoning_content"] = "\n".join(thoughts)
    yield rest

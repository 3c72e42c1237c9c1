"""Body of OpenAI's /v1/responses, and how it translates to a chat.

Nothing is kept here: a conversation comes whole with each request, as with chat completions. What
would need a store (`previous_response_id`, `conversation`, `background`) is refused.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag

from xllm.errors import InvalidRequest
from xllm.roles.api.base_model import ApiModel
from xllm.roles.api.body import as_chat_request
from xllm.roles.api.constraints import JsonObjectFormat, TextFormat
from xllm.roles.api.requests import ChatCompletionRequest
from xllm.roles.api.tool_requests import MAX_TOOLS

_MAX_INT32 = 2**31 - 1
_NEEDS_A_STORE = ("previous_response_id", "conversation", "prompt")


class ContentPart(ApiModel):
    type: Literal["input_text", "output_text", "text"]
    text: str


Content = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[list[ContentPart], Field(fail_fast=True), Tag("<parts>")],
    Discriminator(lambda value: "<text>" if isinstance(value, str) else "<parts>"),
]


class InputMessage(ApiModel):
    type: Literal["message"] | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: Content


class FunctionCallItem(ApiModel):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


class FunctionCallOutput(ApiModel):
    type: Literal["function_call_output"]
    call_id: str
    output: Content


class ReasoningItem(ApiModel):
    """What the model thought before; templates show it where they want to."""

    type: Literal["reasoning"]


_ITEMS = ("message", "function_call", "function_call_output", "reasoning")


def _item_kind(value: Any) -> str | None:
    if not isinstance(value, dict):
        value = {"type": getattr(value, "type", None), "role": getattr(value, "role", None)}
    kind = value.get("type") or ("message" if "role" in value else None)
    return f"<{kind}>" if kind in _ITEMS else None


InputItem = Annotated[
    Annotated[InputMessage, Tag("<message>")]
    | Annotated[FunctionCallItem, Tag("<function_call>")]
    | Annotated[FunctionCallOutput, Tag("<function_call_output>")]
    | Annotated[ReasoningItem, Tag("<reasoning>")],
    Discriminator(
        _item_kind,
        custom_error_type="item_type",
        custom_error_message=f"type must be one of {', '.join(_ITEMS)}",
    ),
]


class FunctionTool(ApiModel):
    type: Literal["function"]
    name: str = Field(min_length=1, max_length=128)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedFunction(ApiModel):
    type: Literal["function"]
    name: str


class JsonSchemaTextFormat(ApiModel):
    type: Literal["json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


def _format_kind(value: Any) -> str | None:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return f"<{kind}>" if kind in ("text", "json_object", "json_schema") else None


class TextConfig(ApiModel):
    format: (
        Annotated[
            Annotated[TextFormat, Tag("<text>")]
            | Annotated[JsonObjectFormat, Tag("<json_object>")]
            | Annotated[JsonSchemaTextFormat, Tag("<json_schema>")],
            Discriminator(
                _format_kind,
                custom_error_type="format_type",
                custom_error_message="type must be text, json_object or json_schema",
            ),
        ]
        | None
    ) = None


class ResponsesRequest(ApiModel):
    """Body of /v1/responses."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    input: Annotated[
        Annotated[str, Field(min_length=1), Tag("<text>")]
        | Annotated[list[InputItem], Field(min_length=1, fail_fast=True), Tag("<items>")],
        Discriminator(lambda value: "<text>" if isinstance(value, str) else "<items>"),
    ]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1, le=_MAX_INT32)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    stream: bool | None = None
    tools: list[FunctionTool] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: (
        Annotated[
            Annotated[Literal["none", "auto", "required"], Tag("<word>")]
            | Annotated[NamedFunction, Tag("<tool>")],
            Discriminator(lambda value: "<word>" if isinstance(value, str) else "<tool>"),
        ]
        | None
    ) = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: dict[str, Any] | None = Field(None, description="Up to the model: ignored.")
    metadata: dict[str, str] | None = None
    user: str | None = None
    store: bool | None = Field(None, description="Nothing is stored, whatever it says.")
    background: bool | None = Field(None, description="True is refused.")
    previous_response_id: str | None = Field(None, description="Refused: nothing is stored.")
    conversation: str | dict[str, Any] | None = Field(None, description="Refused likewise.")
    prompt: dict[str, Any] | None = Field(None, description="Refused likewise.")

    def as_chat(self) -> ChatCompletionRequest:
        """The same conversation. Raises: InvalidRequest."""
        for name in _NEEDS_A_STORE:
            if getattr(self, name) is not None:
                raise InvalidRequest(
                    f"{name}: nothing is stored here; send the conversation as input", param=name
                )
        if self.background:
            raise InvalidRequest("background is not supported", param="background")
        fields: dict[str, Any] = {
            "model": self.model,
            "messages": self._chat_messages(),
            "max_completion_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "stream": self.stream,
            "parallel_tool_calls": self.parallel_tool_calls,
        }
        if self.tools:
            fields["tools"] = [_chat_tool(tool) for tool in self.tools]
        if isinstance(self.tool_choice, NamedFunction):
            function = {"name": self.tool_choice.name}
            fields["tool_choice"] = {"type": "function", "function": function}
        else:
            fields["tool_choice"] = self.tool_choice
        form = self.text and self.text.format
        if isinstance(form, JsonSchemaTextFormat):
            schema = {"name": form.name, "schema": form.schema_, "strict": form.strict}
            fields["response_format"] = {"type": "json_schema", "json_schema": schema}
        elif form:
            fields["response_format"] = {"type": form.type}
        return as_chat_request(fields, self.model_extra)

    def _chat_messages(self) -> list[dict[str, Any]]:
        messages: list[dict[str, Any]] = []
        if self.instructions:
            messages.append({"role": "system", "content": self.instructions})
        if isinstance(self.input, str):
            return [*messages, {"role": "user", "content": self.input}]
        for item in self.input:
            if isinstance(item, InputMessage):
                messages.append({"role": item.role, "content": _text(item.content)})
            elif isinstance(item, FunctionCallOutput):
                content = _text(item.output)
                messages.append({"role": "tool", "tool_call_id": item.call_id, "content": content})
            elif isinstance(item, FunctionCallItem):
                _add_call(messages, item)
        if not messages:
            raise InvalidRequest("input: nothing but reasoning", param="input")
        return messages


def _add_call(messages: list[dict[str, Any]], item: FunctionCallItem) -> None:
    """To the assistant's message before it, if that is what stands there."""
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": ""})
    function = {"name": item.name, "arguments": item.arguments}
    call = {"id": item.call_id, "type": "function", "function": function}
    messages[-1].setdefault("tool_calls", []).append(call)


def _text(content: str | list[ContentPart]) -> str:
    return content if isinstance(content, str) else "\n".join(part.text for part in content)


def _chat_tool(tool: FunctionTool) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
    return {"type": "function", "function": function}

"""What a request body may contain.

Strict about types (a string is no number), except that an integer is a fine float. An optional
field may be null, which means absent. Unknown fields are ignored; known ones that are not
supported are refused before validation: `unsupported.py`. What depends on the model (vocabulary,
context length) is checked later: `sampling.py`, `prompts.py`.

A union has a discriminator, so that an error names what is wrong with the case that was meant;
its tags are in angle brackets, which `errors.py` leaves out of the parameter's name.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
)

from xllm.protocol import MAX_N

MAX_SAMPLES = 512
"""Prompts times n in one request."""
MAX_LOGPROBS = 20
MAX_STOPS = 64
MAX_STOP_CHARS = 1024

_INT64_MIN, _INT64_MAX = -(2**63), 2**63 - 1
_MAX_INT32 = 2**31 - 1


class ApiModel(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, allow_inf_nan=False)


def _prompt_kind(value: Any) -> str | None:
    """A list is told by its first entry."""
    if isinstance(value, str):
        return "<text>"
    if not isinstance(value, list):
        return None
    if not value or isinstance(value[0], str):
        return "<texts>"
    return "<token_lists>" if isinstance(value[0], list) else "<tokens>"


def _content_kind(value: Any) -> str | None:
    if isinstance(value, str):
        return "<text>"
    return "<parts>" if isinstance(value, list) else None


Text = Annotated[str, Field(min_length=1)]
TokenId = Annotated[int, Field(ge=0, le=_MAX_INT32)]
TokenIdKey = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
PromptTokenId = Annotated[
    int, WithJsonSchema({"type": "integer", "minimum": 0, "maximum": _MAX_INT32})
]
"""What it may be is checked against the vocabulary, once for all ids of a prompt."""
TokenIds = Annotated[list[PromptTokenId], Field(min_length=1, fail_fast=True)]
Prompt = Annotated[
    Annotated[Text, Tag("<text>")]
    | Annotated[list[Text], Field(min_length=1, fail_fast=True), Tag("<texts>")]
    | Annotated[TokenIds, Tag("<tokens>")]
    | Annotated[list[TokenIds], Field(min_length=1, fail_fast=True), Tag("<token_lists>")],
    Discriminator(
        _prompt_kind,
        custom_error_type="prompt_type",
        custom_error_message="must be a string, a list of strings, token ids, or a list of those",
    ),
]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
Stop = Annotated[
    Annotated[StopString, Tag("<text>")]
    | Annotated[list[StopString], Field(max_length=MAX_STOPS), Tag("<texts>")],
    Discriminator(lambda value: "<text>" if isinstance(value, str) else "<texts>"),
]


class StreamOptions(ApiModel):
    include_usage: bool | None = None


class GenerationRequest(ApiModel):
    """What chat and plain completions have in common."""

    model: str | None = Field(None, description="May be left out where one model is served.")
    max_tokens: int | None = Field(None, ge=0, le=_MAX_INT32)
    max_completion_tokens: int | None = Field(
        None, ge=0, le=_MAX_INT32, description="The newer name of max_tokens; wins over it."
    )
    min_tokens: int | None = Field(None, ge=0, le=_MAX_INT32)
    temperature: float | None = Field(None, ge=0, le=2, description="0 is greedy.")
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=_MAX_INT32, description="-1 and 0 are off.")
    min_p: float | None = Field(None, ge=0, le=1)
    n: int | None = Field(None, ge=1, le=MAX_N)
    seed: int | None = Field(None, ge=_INT64_MIN, le=_INT64_MAX)
    stop: Stop | None = None
    stop_token_ids: list[TokenId] | None = Field(None, max_length=1024)
    ignore_eos: bool | None = None
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    logit_bias: dict[TokenIdKey, Annotated[float, Field(ge=-100, le=100)]] | None = Field(
        None, description="Token id, as a string, to what is added to its logit."
    )
    skip_special_tokens: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    cache_salt: str | None = Field(
        None, min_length=1, description="Requests share cached prefixes only under the same salt."
    )

    priority: int | None = Field(
        None, ge=_INT64_MIN, le=_INT64_MAX, description="Lower is more urgent; 0 if left out."
    )

    @field_validator("stream_options")
    @classmethod
    def _check_stream(
        cls, value: StreamOptions | None, info: ValidationInfo
    ) -> StreamOptions | None:
        if value is not None and not info.data.get("stream"):
            raise ValueError("only allowed when stream is true")
        return value

    @property
    def requested_max_tokens(self) -> int | None:
        if self.max_completion_tokens is not None:
            return self.max_completion_tokens
        return self.max_tokens

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives wanted per token; None: no log-probabilities at all."""
        raise NotImplementedError


class CompletionRequest(GenerationRequest):
    """Body of /v1/completions."""

    prompt: Prompt
    echo: bool | None = Field(None, description="Return the prompt in front of its continuation.")
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    add_special_tokens: bool | None = None

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs


class TextPart(ApiModel):
    type: Literal["text"]
    text: str


Content = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[list[TextPart], Field(fail_fast=True), Tag("<parts>")],
    Discriminator(
        _content_kind,
        custom_error_type="content_type",
        custom_error_message="must be a string or a list of text parts",
    ),
]


class FunctionCall(ApiModel):
    name: str
    arguments: str = ""


class ToolCall(ApiModel):
    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


def _drop_null(schema: dict[str, Any]) -> None:
    schema["anyOf"] = [case for case in schema["anyOf"] if case != {"type": "null"}]


class Message(ApiModel):
    # The document asks for content, which is the rule.
    model_config = ConfigDict(json_schema_extra={"required": ["role", "content"]})

    role: Literal["system", "developer", "user", "assistant", "tool"]
    tool_calls: list[ToolCall] | None = None
    content: Content | None = Field(
        None,
        validate_default=True,
        description="May be left out beside tool_calls.",
        json_schema_extra=_drop_null,
    )
    name: str | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None

    @field_validator("content")
    @classmethod
    def _check_content(cls, value: Any, info: ValidationInfo) -> Any:
        if value is None and not info.data.get("tool_calls"):
            raise ValueError("required")
        return value


class ChatRequest(ApiModel):
    """What a conversation is, apart from how it goes on."""

    messages: list[Message] = Field(min_length=1)
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None


class ChatCompletionRequest(GenerationRequest, ChatRequest):
    """Body of /v1/chat/completions."""

    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    @field_validator("top_logprobs")
    @classmethod
    def _check_logprobs(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and not info.data.get("logprobs"):
            raise ValueError("only allowed when logprobs is true")
        return value

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class TokenizeTextRequest(ApiModel):
    """Body of /tokenize with a prompt."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class TokenizeChatRequest(ChatRequest):
    """Body of /tokenize with a conversation."""

    model: str | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(ApiModel):
    """Body of /detokenize."""

    model: str | None = None
    tokens: Annotated[list[PromptTokenId], Field(fail_fast=True)]

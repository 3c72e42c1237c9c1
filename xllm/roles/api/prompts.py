"""Messages and prompts to token ids.

A short text is encoded where it stands, and so is one whose words the tokenizer has met before,
unless it is very long. Others go to a thread, which the tokenizer's Rust half lets run beside the
event loop: a loop that is busy with one prompt delays everybody's tokens.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, TypeVar

from xllm.errors import InvalidRequest
from xllm.protocol import ModelCard
from xllm.roles.api.requests import MAX_SAMPLES, ChatRequest, CompletionRequest, Message, ToolCall
from xllm.roles.api.sampling import check_vocabulary
from xllm.tokenizer import Tokenizer

_LONG_TEXT_CHARS = 1000
_LONG_KNOWN_TEXT_CHARS = 1 << 15
"""About 1 ms, if all words are known."""
_LONG_PROMPT_TOKENS = 10_000

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Prompt:
    token_ids: list[int]
    text: str | None = None
    """As the client wrote it; None where it sent token ids."""


class PromptEncoder:
    """Encodes prompts, on `executor` where it takes long."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor

    async def chat(
        self, request: ChatRequest, tokenizer: Tokenizer, *, add_special_tokens: bool = False
    ) -> Prompt:
        """Raises: InvalidRequest if the template refuses the messages, or nothing is left."""
        messages = [_template_message(i, message) for i, message in enumerate(request.messages)]
        variables: dict[str, Any] = {
            "add_generation_prompt": request.add_generation_prompt is not False
        }
        variables |= request.chat_template_kwargs or {}

        def render() -> str:
            return tokenizer.apply_chat_template(messages, **variables)

        def encode(text: str) -> Prompt:
            return Prompt(tokenizer.encode(text, add_special_tokens), text)

        num_chars = sum(len(message["content"]) for message in messages)
        prompt: Prompt | None = None
        if num_chars < _LONG_KNOWN_TEXT_CHARS:
            text = render()
            prompt = _known(text, tokenizer, add_special_tokens)
            if prompt is None:
                prompt = await self._run(lambda: encode(text), num_chars)
        else:
            prompt = await self._run(lambda: encode(render()), num_chars)
        if not prompt.token_ids:
            raise InvalidRequest("the conversation renders to an empty prompt", param="messages")
        return prompt

    async def completion(
        self, request: CompletionRequest, tokenizer: Tokenizer, card: ModelCard
    ) -> list[Prompt]:
        """Every prompt of the request, in its order.

        Raises: InvalidRequest for an empty prompt, an unknown token, or too many samples.
        """
        given = request.prompt
        is_one = isinstance(given, str) or isinstance(given[0], int)
        entries: list[Any] = [given] if is_one else list(given)
        if len(entries) * (request.n or 1) > MAX_SAMPLES:
            raise InvalidRequest(
                f"{len(entries)} prompts times n = {request.n or 1} is over the {MAX_SAMPLES} "
                "samples that one request may ask for",
                param="prompt" if len(entries) > MAX_SAMPLES else "n",
            )
        if isinstance(entries[0], str):
            prompts = await self.texts(
                entries, tokenizer, add_special_tokens=request.add_special_tokens is not False
            )
        else:
            prompts = [Prompt(token_ids) for token_ids in entries]
        for i, prompt in enumerate(prompts):
            param = "prompt" if is_one else f"prompt[{i}]"
            if not prompt.token_ids:
                raise InvalidRequest(f"{param} is empty", param=param)
            # What the tokenizer makes is in its own vocabulary, usually the model's.
            if prompt.text is None or tokenizer.vocab_size > card.vocab_size:
                if len(prompt.token_ids) > _LONG_PROMPT_TOKENS:
                    await asyncio.sleep(0)  # validating it has taken its time
                check_vocabulary(prompt.token_ids, card, param=param)
        return prompts

    async def texts(
        self, texts: list[str], tokenizer: Tokenizer, *, add_special_tokens: bool
    ) -> list[Prompt]:
        if sum(map(len, texts)) < _LONG_KNOWN_TEXT_CHARS:
            known: list[Prompt | None] = [
                _known(text, tokenizer, add_special_tokens) for text in texts
            ]
        else:
            known = [None] * len(texts)
        unknown = [text for text, prompt in zip(texts, known, strict=True) if prompt is None]

        def encode() -> list[Prompt]:
            return [Prompt(tokenizer.encode(text, add_special_tokens), text) for text in unknown]

        if not unknown:
            return [prompt for prompt in known if prompt is not None]
        encoded = iter(await self._run(encode, sum(map(len, unknown))))
        return [prompt or next(encoded) for prompt in known]

    async def decode(self, token_ids: list[int], tokenizer: Tokenizer) -> str:
        """Special tokens spelled out."""

        def decode() -> str:
            return tokenizer.decode(token_ids, skip_special_tokens=False)

        return await self._run(decode, len(token_ids))

    async def _run(self, work: Callable[[], T], num_chars: int) -> T:
        if num_chars < _LONG_TEXT_CHARS:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)


def _known(text: str, tokenizer: Tokenizer, add_special_tokens: bool) -> Prompt | None:
    token_ids = tokenizer.try_encode_quickly(text, add_special_tokens)
    return None if token_ids is None else Prompt(token_ids, text)


def _template_message(index: int, message: Message) -> dict[str, Any]:
    """As templates expect a message: text in one string, arguments of a call as an object."""
    content = message.content
    if isinstance(content, list):
        content = "\n".join(part.text for part in content)
    rendered: dict[str, Any] = {"role": message.role, "content": content or ""}
    for name in ("name", "tool_call_id", "reasoning_content"):
        if (value := getattr(message, name)) is not None:
            rendered[name] = value
    if message.tool_calls:
        rendered["tool_calls"] = [
            _template_tool_call(call, f"messages[{index}].tool_calls[{i}]")
            for i, call in enumerate(message.tool_calls)
        ]
    return rendered


def _template_tool_call(call: ToolCall, param: str) -> dict[str, Any]:
    try:
        arguments = json.loads(call.function.arguments or "{}")
    except (ValueError, RecursionError) as error:
        param = f"{param}.function.arguments"
        raise InvalidRequest(f"{param} is not JSON: {error}", param=param) from error
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.function.name, "arguments": arguments},
    }

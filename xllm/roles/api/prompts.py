"""Messages and prompts to token ids.

A short text is encoded where it stands. A long one goes to a thread, which the tokenizer's Rust
half lets run beside the event loop: a loop that is busy with one prompt delays everybody's tokens.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from xllm.errors import InvalidRequest
from xllm.protocol import ModelCard
from xllm.roles.api.requests import MAX_SAMPLES, ChatRequest, CompletionRequest, Message, ToolCall
from xllm.roles.api.sampling import check_vocabulary
from xllm.roles.api.tool_prompt import spell_out_tools
from xllm.token_cache import TokenCache
from xllm.tokenizer import Tokenizer

_LONG_TEXT_CHARS = 1000
_LONG_PROMPT_TOKENS = 10_000

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Prompt:
    token_ids: list[int]
    text: str | None = None
    """As the client wrote it; None where it sent token ids."""


class PromptEncoder:
    """Encodes prompts, on `executor` where it takes long."""

    def __init__(
        self, executor: Executor, on_known: Callable[[int], None] = lambda num_tokens: None
    ) -> None:
        """`on_known` is told how many tokens of a prompt an earlier one had."""
        self._executor = executor
        self._on_known = on_known
        self._caches: WeakKeyDictionary[Tokenizer, TokenCache] = WeakKeyDictionary()

    async def chat(
        self,
        request: ChatRequest,
        tokenizer: Tokenizer,
        salt: str | None = None,
        *,
        add_special_tokens: bool = False,
    ) -> Prompt:
        """With a `salt`, what its tenant has sent before is not tokenized again.

        Raises: InvalidRequest if the template refuses the messages, or nothing is left.
        """
        messages = [_template_message(i, message) for i, message in enumerate(request.messages)]
        goes_on = bool(request.continue_final_message)
        if goes_on and request.add_generation_prompt:
            raise InvalidRequest(
                "continue_final_message and add_generation_prompt exclude each other",
                param="continue_final_message",
            )
        variables: dict[str, Any] = {
            "add_generation_prompt": request.add_generation_prompt is not False and not goes_on
        }
        tools = request.template_tools
        if not tokenizer.template_mentions("tools"):
            messages = spell_out_tools(messages, tools)
        elif tools:
            variables["tools"] = tools
        variables |= request.chat_template_kwargs or {}

        to_prompt = await self._prepare(tokenizer, salt, add_special_tokens)

        def encode() -> tuple[Prompt, int]:
            text = tokenizer.apply_chat_template(messages, **variables)
            if goes_on:
                text = _up_to_end_of(messages[-1]["content"], text)
            return to_prompt(text)

        num_chars = sum(len(message["content"]) for message in messages) + len(str(tools))
        prompt, num_known = await self.run(encode, num_chars)
        self._on_known(num_known)
        if not prompt.token_ids:
            raise InvalidRequest("the conversation renders to an empty prompt", param="messages")
        return prompt

    async def completion(
        self,
        request: CompletionRequest,
        tokenizer: Tokenizer,
        card: ModelCard,
        salt: str | None = None,
    ) -> list[Prompt]:
        """Every prompt of the request, in its order; `salt` as for a chat.

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
            add_special_tokens = request.add_special_tokens is not False
            prompts = await self.texts(
                entries, tokenizer, salt, add_special_tokens=add_special_tokens
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
        self,
        texts: list[str],
        tokenizer: Tokenizer,
        salt: str | None = None,
        *,
        add_special_tokens: bool,
    ) -> list[Prompt]:
        """Each text's, in their order; `salt` as for a chat."""
        to_prompt = await self._prepare(tokenizer, salt, add_special_tokens)
        encoded = await self.run(lambda: [to_prompt(text) for text in texts], sum(map(len, texts)))
        self._on_known(sum(num_known for _, num_known in encoded))
        return [prompt for prompt, _ in encoded]

    async def decode(self, token_ids: list[int], tokenizer: Tokenizer) -> str:
        """Special tokens spelled out."""

        def decode() -> str:
            return tokenizer.decode(token_ids, skip_special_tokens=False)

        return await self.run(decode, len(token_ids))

    async def _prepare(
        self, tokenizer: Tokenizer, salt: str | None, add_special_tokens: bool
    ) -> Callable[[str], tuple[Prompt, int]]:
        """What makes a prompt of a text, on any thread, and says how much of it was known."""
        if salt is None:
            return lambda text: (Prompt(tokenizer.encode(text, add_special_tokens), text), 0)
        cache = self._caches.get(tokenizer)
        if cache is None:
            # On a thread, because some models have a thousand special tokens to look at.
            made = await self.run(lambda: TokenCache(tokenizer), _LONG_TEXT_CHARS)
            cache = self._caches.setdefault(tokenizer, made)

        def encode(text: str) -> tuple[Prompt, int]:
            token_ids, num_known = cache.encode(text, salt, add_special_tokens)
            return Prompt(token_ids, text), num_known

        return encode

    async def run(self, work: Callable[[], T], num_chars: int) -> T:
        """Does something that takes about as long as encoding so many characters."""
        if num_chars < _LONG_TEXT_CHARS:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)


def _up_to_end_of(content: str, prompt: str) -> str:
    """`prompt` without what the template puts behind its last message. Raises: InvalidRequest."""
    content = content.strip()
    start = prompt.rfind(content) if content else -1
    if start < 0:
        raise InvalidRequest(
            "continue_final_message: the last message is empty, or the model's chat template "
            "does not show it as it is",
            param="continue_final_message",
        )
    return prompt[: start + len(content)]


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

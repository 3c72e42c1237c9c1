"""Stand-ins for what a test does not want to be real: a tiny tokenizer and a scripted backend."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from functools import cache

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from xllm.chat_template import ChatTemplate
from xllm.errors import RequestError, UnknownModel
from xllm.protocol import (
    FinishReason,
    GenerateRequest,
    ModelCard,
    TokenDelta,
    TokenLogprob,
    WorkerId,
)
from xllm.tokenizer import Tokenizer

MODEL = "fake-model"
WORKER = WorkerId("127.0.0.1:8010")
CHAT_TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
_CORPUS = ["the quick brown fox jumps over the lazy dog", "größer ist schöner", "日本語と😀"]


@cache
def tiny_core() -> str:
    """A byte-level BPE of 300 tokens, as the text of its tokenizer.json."""
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|start|>", "<|end|>"],
    )
    core.train_from_iterator(_CORPUS, trainer)
    return str(core.to_str())


def tiny_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> Tokenizer:
    return Tokenizer(
        tokenizers.Tokenizer.from_str(tiny_core()),
        special_tokens={"eos_token": "<|end|>"},
        chat_template=ChatTemplate(chat_template) if chat_template else None,
    )


def spm_tokenizer() -> Tokenizer:
    """Sentencepiece as Llama 2 has it: ▁ for spaces, one token per byte, a space put in front."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    words = ["▁", "▁▁", "a", "b", "the", "▁a", "▁the", "ab", "é", "日"]
    for token in [*(f"<0x{byte:02X}>" for byte in range(256)), *words]:
        vocab[token] = len(vocab)
    merges = [("▁", "a"), ("a", "b"), ("▁", "▁")]
    core = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>")
    )
    core.add_special_tokens(["<unk>", "<s>", "</s>"])
    core.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    core.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return Tokenizer(core, special_tokens={"bos_token": "<s>", "eos_token": "</s>"})


Step = TokenDelta | RequestError | asyncio.Event
"""What a script brings next: a delta, an error, or a wait."""
Script = Callable[[GenerateRequest], Iterable[Step]]


def says(
    token_ids: Sequence[int],
    *,
    finish_reason: FinishReason = FinishReason.STOP,
    stop_token_id: int | None = None,
    cached_tokens: int = 0,
) -> Script:
    """Every sample gets these tokens, one a step, within its `max_tokens`."""

    def script(request: GenerateRequest) -> Iterable[Step]:
        sampling = request.sampling
        ids = list(token_ids)
        if stop_token_id is not None:
            ids.append(stop_token_id)
        is_cut = len(ids) > sampling.max_tokens
        ids = ids[: sampling.max_tokens]
        reason = FinishReason.LENGTH if is_cut or not ids else finish_reason
        for offset in range(max(len(ids), 1)):
            is_last = offset >= len(ids) - 1
            for index in range(request.index, request.index + request.n):
                yield TokenDelta(
                    request_id=request.request_id,
                    attempt=request.attempt,
                    index=index,
                    offset=offset,
                    token_ids=ids[offset : offset + 1],
                    finish_reason=reason if is_last else None,
                    stop_token_id=None if is_cut or not is_last else stop_token_id,
                    logprobs=_logprobs(ids[offset : offset + 1], sampling.logprobs),
                    prompt_logprobs=_prompt_logprobs(request) if offset == 0 else None,
                    cached_tokens=cached_tokens,
                )

    return script


def _logprobs(token_ids: Sequence[int], num_top: int | None) -> list[TokenLogprob] | None:
    if num_top is None:
        return None
    return [
        TokenLogprob(i, -0.5, [((i + k) % 256, -0.5 - k) for k in range(num_top)])
        for i in token_ids
    ]


def _prompt_logprobs(request: GenerateRequest) -> list[TokenLogprob | None] | None:
    num_top = request.sampling.prompt_logprobs
    if num_top is None:
        return None
    return [None, *(_logprobs(request.prompt_ids[1:], num_top) or ())]


class FakeGeneration:
    """Follows a script; remembers whether it was cancelled."""

    def __init__(
        self, request: GenerateRequest, steps: Iterable[Step], worker_id: WorkerId
    ) -> None:
        self.request = request
        self.worker_id = worker_id
        self.cancelled = asyncio.Event()
        self.num_sent = 0
        self._steps = steps

    async def __aiter__(self) -> AsyncIterator[TokenDelta]:
        for step in self._steps:
            if isinstance(step, asyncio.Event):
                await step.wait()
            elif isinstance(step, RequestError):
                raise step
            else:
                self.num_sent += 1
                yield step
                # A real engine's deltas come in steps of its own.
                await asyncio.sleep(0)

    def cancel(self) -> None:
        self.cancelled.set()


class FakeBackend:
    """Models with one tokenizer, and one script for whatever is asked."""

    def __init__(
        self,
        script: Script,
        *,
        tokenizer: Tokenizer | None = None,
        models: Sequence[str] = (MODEL,),
        max_model_len: int = 256,
        vocab_size: int = 300,
    ) -> None:
        self.script = script
        self.models = list(models)
        self.refusal: RequestError | None = None
        """Raised by `generate`."""
        self.generations: list[FakeGeneration] = []
        self.started = asyncio.Event()
        self._tokenizer = tokenizer or tiny_tokenizer()
        self._max_model_len = max_model_len
        self._vocab_size = vocab_size

    def model_cards(self) -> list[ModelCard]:
        return [
            ModelCard(
                model_id=model,
                max_model_len=self._max_model_len,
                vocab_size=self._vocab_size,
                created=1_700_000_000,
            )
            for model in self.models
        ]

    async def tokenizer(self, model_id: str) -> Tokenizer:
        if model_id not in self.models:
            raise UnknownModel(f"no such model: {model_id}", param="model")
        return self._tokenizer

    async def until_reachable(self, model_id: str | None) -> None:
        """It always is."""

    def admit(self, model_id: str) -> None:
        """`generate` refuses."""

    async def prepare(self, request: GenerateRequest) -> None:
        """Nothing takes long."""

    def generate(self, request: GenerateRequest) -> FakeGeneration:
        if self.refusal is not None:
            raise self.refusal
        generation = FakeGeneration(request, self.script(request), WORKER)
        self.generations.append(generation)
        self.started.set()
        return generation

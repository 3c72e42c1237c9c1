"""Makes the fixtures: `transformers` on the same folders. Run by `scripts/golden --regenerate`.

Not imported by any test, so that testing does not need `transformers`.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from tests.golden.fixtures import (
    GOLDEN_FOLDER,
    NUM_OUTPUT_TOKENS,
    NUM_TINY_TOKENS,
    TINY_PROMPT_LENGTHS,
    evaluated_rows,
)
from tests.golden.prompts import build_prompts
from tests.golden.tiny_models import TINY_MODELS, prompt_ids, write_model
from xllm.tokenizer import Tokenizer


def regenerate(model_folder: Path) -> None:
    GOLDEN_FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        for name, model in TINY_MODELS.items():
            print(f"{name}", flush=True)
            folder = write_model(Path(scratch) / name, model)
            _write(f"tiny_{name}", _tiny(folder, model.config["vocab_size"]))
    _write("default_model", _default_model(model_folder))


def _write(name: str, content: object) -> None:
    path = GOLDEN_FOLDER / f"{name}.json"
    path.write_text(json.dumps(content, separators=(",", ":")) + "\n")


def _load(folder: Path, dtype: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@torch.inference_mode()
def _tiny(folder: Path, vocab_size: int) -> dict[str, Any]:
    model = _load(folder, torch.float32)
    prompts = []
    for seed, length in enumerate(TINY_PROMPT_LENGTHS):
        ids = prompt_ids(length, vocab_size, seed)
        logprobs = torch.log_softmax(model(torch.tensor([ids])).logits[0], dim=1)
        following = torch.tensor(ids[1:]).unsqueeze(1)
        prompts.append(
            {
                "length": length,
                "seed": seed,
                "prompt_logprobs": _rounded(logprobs[:-1].gather(1, following).squeeze(1)),
                **_run(model, ids, NUM_TINY_TOKENS)[1],
            }
        )
    cos, sin = model.model.rotary_emb(torch.zeros(1, dtype=torch.float32), torch.arange(512)[None])
    half = cos.shape[-1] // 2
    probed = torch.cat((cos[0, :, :half], sin[0, :, :half]), dim=1)[[0, 1, 63, 200, 511]]
    return {"prompts": prompts, "cos_sin_at_0_1_63_200_511": probed.tolist()}


@torch.inference_mode()
def _default_model(folder: Path) -> dict[str, Any]:
    prompts = build_prompts(Tokenizer.from_folder(folder).encode)
    wide = _load(folder, torch.float32)
    narrow = _load(folder, torch.bfloat16)
    entries = []
    for ids in prompts:
        print(f"prompt of {len(ids)} tokens", flush=True)
        exact, continuation = _run(wide, ids, NUM_OUTPUT_TOKENS)
        rounded, _ = _run(narrow, ids, 0)
        error = (rounded - exact).norm() / exact.norm()
        entries.append(
            {"prompt_ids": ids, "bfloat16_error": round(float(error), 6), **continuation}
        )
    return {"prompts": entries}


def _run(model: Any, ids: Sequence[int], num_tokens: int) -> tuple[torch.Tensor, dict[str, Any]]:
    """([rows, V] float32 logits at the evaluated rows of the prompt, the greedy continuation past
    EOS with the distance between the two largest logits before each token)."""
    result = model.model(torch.tensor([ids]), use_cache=True)
    evaluated = model.lm_head(result.last_hidden_state[0, evaluated_rows(len(ids))]).float()
    output_ids, gaps = [], []
    for _ in range(num_tokens):
        logits = model.lm_head(result.last_hidden_state[:, -1])
        best, second = logits[0].topk(2).values.tolist()
        following = logits.argmax(dim=1, keepdim=True)
        output_ids.append(int(following))
        gaps.append(best - second)
        result = model.model(following, past_key_values=result.past_key_values, use_cache=True)
    return evaluated, {"output_ids": output_ids, "gaps": _rounded(gaps)}


def _rounded(values: torch.Tensor | Sequence[float]) -> list[float]:
    return [round(float(value), 6) for value in values]

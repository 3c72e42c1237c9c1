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
                **_greedy(model, ids, NUM_TINY_TOKENS),
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
        rows = evaluated_rows(len(ids))
        exact = _logits(wide, ids, rows)
        error = (_logits(narrow, ids, rows) - exact).norm() / exact.norm()
        entries.append(
            {
                "prompt_ids": ids,
                "bfloat16_error": round(float(error), 6),
                **_greedy(wide, ids, NUM_OUTPUT_TOKENS),
            }
        )
    return {"prompts": entries}


def _logits(model: Any, ids: Sequence[int], rows: Sequence[int]) -> torch.Tensor:
    hidden = model.model(torch.tensor([ids])).last_hidden_state[0, list(rows)]
    logits: torch.Tensor = model.lm_head(hidden).float()
    return logits


def _greedy(model: Any, ids: Sequence[int], num_tokens: int) -> dict[str, Any]:
    """Past EOS; with the distance between the two largest logits before each token."""
    cache = None
    following = torch.tensor([ids])
    output_ids, gaps = [], []
    for _ in range(num_tokens):
        result = model(following, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = result.past_key_values
        best, second = result.logits[0, -1].topk(2).values.tolist()
        following = result.logits[:, -1].argmax(dim=1, keepdim=True)
        output_ids.append(int(following))
        gaps.append(best - second)
    return {"output_ids": output_ids, "gaps": _rounded(gaps)}


def _rounded(values: torch.Tensor | Sequence[float]) -> list[float]:
    return [round(float(value), 6) for value in values]

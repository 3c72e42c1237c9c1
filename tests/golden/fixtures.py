"""The committed outputs of the oracle, and the rule by which ours are compared with them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GOLDEN_FOLDER = Path(__file__).parent.parent / "fixtures" / "golden"
NUM_OUTPUT_TOKENS = 64
NUM_TINY_TOKENS = 16
TINY_PROMPT_LENGTHS = (1, 33, 200)
CLOSE_CALL = 1e-4
"""Where the oracle's two largest logits are this close, either token is right."""


@dataclass(frozen=True)
class GoldenPrompt:
    prompt_ids: list[int]
    output_ids: list[int]
    gaps: list[float]
    bfloat16_error: float
    """Of `transformers` in bfloat16: ||logits - exact|| / ||exact|| over `evaluated_rows`."""

    def mismatch(self, output_ids: Sequence[int]) -> str | None:
        """What is wrong with our greedy continuation; None: nothing."""
        for step, token_id in enumerate(output_ids):
            if token_id != self.output_ids[step]:
                if self.gaps[step] < CLOSE_CALL:
                    return None  # from here on the texts differ for a good reason
                return (
                    f"prompt of {len(self.prompt_ids)} tokens: token {step} is {token_id}, the "
                    f"oracle's {self.output_ids[step]} with a gap of {self.gaps[step]}"
                )
        return None


def load_golden_prompts() -> list[GoldenPrompt]:
    """Of the default model, ascending in length."""
    return [GoldenPrompt(**entry) for entry in load_fixture("default_model")["prompts"]]


def load_fixture(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((GOLDEN_FOLDER / f"{name}.json").read_text())
    return content


def evaluated_rows(length: int) -> list[int]:
    """Up to 64 positions of a prompt, evenly spread, its last included."""
    num_rows = min(length, 64)
    return [(row + 1) * length // num_rows - 1 for row in range(num_rows)]

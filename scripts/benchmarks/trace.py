"""Mooncake's conversation trace: requests whose prompts are chains of block names."""

from __future__ import annotations

import json
import lzma
from dataclasses import dataclass
from pathlib import Path

from xllm.protocol import BlockHash

CONVERSATION = Path(__file__).parent / "data" / "mooncake_conversation.jsonl.xz"


@dataclass(frozen=True, slots=True)
class TracedRequest:
    """One request: when it came, and its prompt as blocks of 512 tokens."""

    time_s: float
    blocks: list[BlockHash]
    input_length: int
    output_length: int


def read_trace(path: Path = CONVERSATION) -> list[TracedRequest]:
    """Reads a trace in Mooncake's format, xz-compressed or plain."""
    opener = lzma.open if path.suffix == ".xz" else open
    with opener(path, "rt") as file:
        return [_request(json.loads(line)) for line in file]


def _request(fields: dict[str, object]) -> TracedRequest:
    timestamp, hash_ids = fields["timestamp"], fields["hash_ids"]
    input_length, output_length = fields["input_length"], fields["output_length"]
    assert isinstance(timestamp, int | float)
    assert isinstance(hash_ids, list)
    assert isinstance(input_length, int)
    assert isinstance(output_length, int)
    blocks = [BlockHash(i.to_bytes(16, "little")) for i in hash_ids]
    return TracedRequest(timestamp / 1e3, blocks, input_length, output_length)

"""Names of prompts' blocks, made ahead of routing where that takes milliseconds. Pure.

A block's name takes a microsecond, so those of a very long prompt keep the event loop longer than
anybody's tokens should wait. `prepare` may run on another thread; `of` then finds them made.
"""

from __future__ import annotations

from xllm.cache.block_hash import CacheRoot, hash_blocks
from xllm.protocol import BlockHash, GenerateRequest

LONG_TOKENS = 8192
MAX_KEPT = 64
"""Prompts; one that was dropped is named again."""

Key = tuple[str, BlockHash]


class PromptNames:
    def __init__(self) -> None:
        self._kept: dict[Key, list[BlockHash]] = {}

    def prepare(self, request: GenerateRequest, root: CacheRoot) -> None:
        """Makes and keeps the names of a prompt. Any thread."""
        parent = root.hash(request.salt)
        names = hash_blocks(parent, request.prompt_ids, root.block_size)
        while len(self._kept) >= MAX_KEPT:
            self._kept.pop(next(iter(self._kept)), None)
        self._kept[request.request_id, parent] = names

    def of(self, request: GenerateRequest, root: CacheRoot) -> list[BlockHash]:
        """Of the full blocks of the prompt and of the output so far."""
        parent = root.hash(request.salt)
        names = self._kept.get((request.request_id, parent), [])
        if names and not request.output_ids:
            return names
        token_ids = request.prompt_ids
        if request.output_ids:
            token_ids = token_ids + request.output_ids
        start = len(names) * root.block_size
        return names + hash_blocks(
            names[-1] if names else parent, token_ids, root.block_size, start
        )

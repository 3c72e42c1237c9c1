"""Our engine behind peer_protocol.py: MODEL_FOLDER BLOCK_SIZE MAX_MODEL_LEN."""

from __future__ import annotations

import asyncio
import os
import random
import sys
import threading
from pathlib import Path

from benchmarks.engine_streams import StreamBench
from benchmarks.peer_protocol import Generate, serve
from xllm.config import EngineConfig
from xllm.engine.engine import Engine
from xllm.engine.runner import Runner


def load() -> tuple[Generate, int]:
    folder, block_size, max_model_len = sys.argv[1:]
    config = EngineConfig(
        device="cpu",
        dtype="bfloat16",
        block_size=int(block_size),
        max_model_len=int(max_model_len),
        max_cache_size=2 << 30,
        num_threads=int(os.environ["OMP_NUM_THREADS"]),
    )
    engine = Engine(Runner(config, Path(folder)))
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    asyncio.run_coroutine_threadsafe(engine.start(), loop).result()
    bench = StreamBench(engine, random.Random(0))

    async def generate_all(prompts: list[list[int]], max_tokens: int) -> None:
        for stream in [bench.submit(prompt, max_tokens) for prompt in prompts]:
            await stream.has_ended.wait()
            if stream.error is not None:
                raise stream.error

    def generate(prompts: list[list[int]], max_tokens: int) -> None:
        asyncio.run_coroutine_threadsafe(generate_all(prompts, max_tokens), loop).result()

    return generate, engine.vocab_size


if __name__ == "__main__":
    serve(load)

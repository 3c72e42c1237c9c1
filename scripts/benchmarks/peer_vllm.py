"""vLLM behind peer_protocol.py, in its own environment: MODEL_FOLDER BLOCK_SIZE MAX_MODEL_LEN."""

from __future__ import annotations

import sys

from benchmarks.peer_protocol import Generate, serve


def load() -> tuple[Generate, int]:
    from vllm import LLM, SamplingParams

    folder, block_size, max_model_len = sys.argv[1:]
    llm = LLM(
        model=folder,
        dtype="bfloat16",
        block_size=int(block_size),
        max_model_len=int(max_model_len),
        enable_prefix_caching=True,
        seed=0,
    )

    def generate(prompts: list[list[int]], max_tokens: int) -> None:
        params = SamplingParams(
            temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False
        )
        llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)

    return generate, llm.get_tokenizer().vocab_size


if __name__ == "__main__":
    serve(load)

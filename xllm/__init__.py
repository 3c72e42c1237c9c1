"""xllm serves LLMs from a cluster whose KV cache is one."""

__version__ = "0.1.0"

"""A model that is quick on one core and says something else after every prompt."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tests.golden.tiny_models import TinyModel, write_model
from xllm.model_store import resolve_model

MODEL_ID = "chaos"

_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    "chat_template.jinja",
)

_LLAMA = TinyModel(
    {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }
)


def write_chaos_model(folder: Path) -> Path:
    """Random weights under the default model's tokenizer."""
    write_model(folder, _LLAMA)
    source = resolve_model(None, progress=print)
    for name in _TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copy(source / name, folder / name)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2}))
    return folder

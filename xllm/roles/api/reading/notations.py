"""Which notation a model calls tools in: by what its chat template teaches it, or as told."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from xllm.roles.api.reading.calls import ToolReader
from xllm.roles.api.reading.hermes import HermesReader
from xllm.roles.api.reading.llama import LlamaReader
from xllm.roles.api.reading.pythonic import PythonicReader
from xllm.tokenizer import Tokenizer

NOTATIONS: Mapping[str, type[ToolReader]] = MappingProxyType(
    {"hermes": HermesReader, "llama3_json": LlamaReader, "pythonic": PythonicReader}
)
_TELLTALES = (
    ("<tool_call>", HermesReader),
    ("<|python_start|>", PythonicReader),
    ("<|python_tag|>", LlamaReader),
    ('"parameters": dictionary of argument name', LlamaReader),
)
"""Of a chat template, in this order."""


def notation_of(tokenizer: Tokenizer, name: str) -> type[ToolReader]:
    """`name`: a key of `NOTATIONS`, or auto. A model whose template knows no tools is taught
    Hermes' notation by `tool_prompt.py`."""
    if name != "auto":
        return NOTATIONS[name]
    for text, notation in _TELLTALES:
        if tokenizer.template_mentions(text):
            return notation
    return HermesReader

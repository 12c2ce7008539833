"""Qwen2: a Llama with biases of queries, keys and values, and a window in the last layers or in none."""

from __future__ import annotations

from chameleon_deploy.reference.families import llama
from chameleon_deploy.reference.families.spec import Family

QWEN2 = Family("qwen2", "Qwen2, Qwen2.5, Qwen2.5-Coder, DeepSeek-R1-Distill-Qwen", llama.spec, llama.SUPPORTED)

"""Qwen3, the dense models: a Llama whose queries and keys are normalised head by head."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from chameleon_deploy.reference.families import llama
from chameleon_deploy.reference.families.spec import DecoderSpec, Family


def spec(config: Any) -> DecoderSpec:
    """Return the switches of a configuration."""
    return replace(llama.spec(config), query_key_norm="head")


QWEN3 = Family("qwen3", "Qwen3 (dense)", spec, llama.SUPPORTED)

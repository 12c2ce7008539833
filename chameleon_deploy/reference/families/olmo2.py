"""OLMo 2: a Llama whose layers normalise what they add instead of what they read, and all queries and keys together."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from chameleon_deploy.reference.families import llama
from chameleon_deploy.reference.families.spec import DecoderSpec, Family

NAMES = replace(
    llama.NAMES,
    attention_norm=None,
    mlp_norm=None,
    attention_post_norm="post_attention_layernorm",
    mlp_post_norm="post_feedforward_layernorm",
)


def spec(config: Any) -> DecoderSpec:
    """Return the switches of a configuration."""
    return replace(llama.spec(config), names=NAMES, query_key_norm="all")


OLMO2 = Family("olmo2", "OLMo 2", spec, llama.SUPPORTED)

"""Granite, the dense models: a Llama with four constant multipliers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from chameleon_deploy.reference.families import llama
from chameleon_deploy.reference.families.spec import DecoderSpec, Family


def spec(config: Any) -> DecoderSpec:
    """Return the switches of a configuration."""
    return replace(
        llama.spec(config),
        scale=config.attention_multiplier,
        embedding_multiplier=config.embedding_multiplier,
        residual_multiplier=config.residual_multiplier,
        logits_multiplier=1 / config.logits_scaling,
    )


GRANITE = Family("granite", "Granite 3 (dense)", spec, llama.SUPPORTED)

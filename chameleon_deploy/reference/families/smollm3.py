"""SmolLM3: a Llama without positions in every fourth layer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from chameleon_deploy.reference.families import llama
from chameleon_deploy.reference.families.spec import DecoderSpec, Family


def spec(config: Any) -> DecoderSpec:
    """Return the switches of a configuration."""
    plain = llama.spec(config)
    layers = zip(plain.layers, config.no_rope_layers, strict=False)  # the list may be longer
    return replace(
        plain, layers=tuple(layer if has_rotary else replace(layer, rotary=None) for layer, has_rotary in layers)
    )


SMOLLM3 = Family("smollm3", "SmolLM3", spec, llama.SUPPORTED)

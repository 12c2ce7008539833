"""Gemma 3, the models of text: Gemma 2 with norms of queries and keys instead of caps, and another rotary embedding in
layers with a window.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from chameleon_deploy.reference.families import gemma2
from chameleon_deploy.reference.families.llama import ROTARY
from chameleon_deploy.reference.families.spec import DecoderSpec, Family, LayerSpec, windows


def spec(config: Any) -> DecoderSpec:
    """Return the switches of a configuration. transformers reads no cap of attention."""
    layers = zip(config.layer_types, windows(config), strict=True)
    return replace(
        gemma2.spec(config),
        layers=tuple(LayerSpec(f"{ROTARY}.{kind}", window) for kind, window in layers),
        query_key_norm="head",
        attention_cap=None,
    )


GEMMA3 = Family("gemma3_text", "Gemma 3 (text)", spec, gemma2.SUPPORTED)

"""Gemma 2: norms before and after attention and MLP, whose weights are stored less one, soft caps, and a window in
every other layer.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from chameleon_deploy.reference.families import llama
from chameleon_deploy.reference.families.spec import (
    ACTIVATIONS,
    DecoderSpec,
    Family,
    LayerSpec,
    dimensions,
    windows,
)

NAMES = replace(
    llama.NAMES,
    attention_post_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_post_norm="post_feedforward_layernorm",
)
SUPPORTED = {"hidden_activation": tuple(ACTIVATIONS), "use_bidirectional_attention": (None, False)}


def spec(config: Any) -> DecoderSpec:
    """Return the switches of a configuration."""
    return DecoderSpec(
        **dimensions(config) | {"scale": config.query_pre_attn_scalar**-0.5},
        layers=tuple(LayerSpec(llama.ROTARY, window) for window in windows(config)),
        names=NAMES,
        norm="rms",
        norm_offset=1.0,
        epsilon=config.rms_norm_eps,
        activation=ACTIVATIONS[config.hidden_activation],
        attention_cap=config.attn_logit_softcapping,
        logits_cap=config.final_logit_softcapping,
        embedding_multiplier=config.hidden_size**0.5,
    )


GEMMA2 = Family("gemma2", "Gemma 2", spec, SUPPORTED)

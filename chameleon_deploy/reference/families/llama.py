"""Llama: RMS norms, a rotary embedding, grouped queries, a gated MLP. Most families are this with a few changes."""

from __future__ import annotations

from typing import Any

from chameleon_deploy.reference.families.spec import (
    ACTIVATIONS,
    DecoderSpec,
    Family,
    LayerSpec,
    Names,
    dimensions,
    windows,
)

NAMES = Names(
    embedding="model.embed_tokens",
    last_norm="model.norm",
    layer="model.layers.{}",
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    o="self_attn.o_proj",
    up=("mlp.gate_proj", "mlp.up_proj"),
    down="mlp.down_proj",
    attention_norm="input_layernorm",
    mlp_norm="post_attention_layernorm",
    query_norm="self_attn.q_norm",
    key_norm="self_attn.k_norm",
    joined_qkv="self_attn.qkv_proj",
    joined_up="mlp.gate_up_proj",
)
ROTARY = "rotary_emb"
SUPPORTED = {"hidden_act": tuple(ACTIVATIONS)}


def spec(config: Any) -> DecoderSpec:
    """Return the switches of a configuration. Whether there are biases is seen in the weights."""
    return DecoderSpec(
        **dimensions(config),
        layers=tuple(LayerSpec(ROTARY, window) for window in windows(config)),
        names=NAMES,
        norm="rms",
        epsilon=config.rms_norm_eps,
        activation=ACTIVATIONS[config.hidden_act],
    )


LLAMA = Family("llama", "Llama 2 and 3, SmolLM2, DeepSeek-R1-Distill-Llama", spec, SUPPORTED)

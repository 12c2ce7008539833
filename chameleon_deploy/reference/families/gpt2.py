"""GPT-2: layer norms, learned positions, a single projection to queries, keys and values, an MLP without a gate."""

from __future__ import annotations

from typing import Any

from chameleon_deploy.reference.families.spec import ACTIVATIONS, DecoderSpec, Family, LayerSpec, Names, dimensions

NAMES = Names(
    embedding="transformer.wte",
    position_embedding="transformer.wpe",
    last_norm="transformer.ln_f",
    layer="transformer.h.{}",
    qkv=("attn.c_attn",),
    o="attn.c_proj",
    up=("mlp.c_fc",),
    down="mlp.c_proj",
    attention_norm="ln_1",
    mlp_norm="ln_2",
)


def spec(config: Any) -> DecoderSpec:
    """Return the switches of a configuration."""
    return DecoderSpec(
        **dimensions(config),
        layers=(LayerSpec(),) * config.num_hidden_layers,
        names=NAMES,
        norm="layer",
        epsilon=config.layer_norm_epsilon,
        activation=ACTIVATIONS[config.activation_function],
        gated=False,
        transposed=True,
    )


GPT2 = Family(
    "gpt2",
    "GPT-2",
    spec,
    {
        "activation_function": tuple(ACTIVATIONS),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    },
)

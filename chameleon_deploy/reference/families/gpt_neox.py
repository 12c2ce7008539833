"""GPT-NeoX: layer norms, a rotary embedding of some channels, attention beside the MLP, queries, keys and values of a
single projection head by head.
"""

from __future__ import annotations

from typing import Any

from chameleon_deploy.reference.families.llama import ROTARY, SUPPORTED
from chameleon_deploy.reference.families.spec import ACTIVATIONS, DecoderSpec, Family, LayerSpec, Names, dimensions

NAMES = Names(
    embedding="gpt_neox.embed_in",
    last_norm="gpt_neox.final_layer_norm",
    layer="gpt_neox.layers.{}",
    qkv=("attention.query_key_value",),
    o="attention.dense",
    up=("mlp.dense_h_to_4h",),
    down="mlp.dense_4h_to_h",
    attention_norm="input_layernorm",
    mlp_norm="post_attention_layernorm",
)


def spec(config: Any) -> DecoderSpec:
    """Return the switches of a configuration."""
    return DecoderSpec(
        **dimensions(config),
        layers=(LayerSpec(ROTARY),) * config.num_hidden_layers,
        names=NAMES,
        norm="layer",
        epsilon=config.layer_norm_eps,
        activation=ACTIVATIONS[config.hidden_act],
        gated=False,
        parallel=config.use_parallel_residual,
        interleaved=True,
    )


GPT_NEOX = Family("gpt_neox", "Pythia, GPT-NeoX", spec, SUPPORTED)

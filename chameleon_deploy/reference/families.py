"""The base models that can be deployed: decoders whose logits are a linear map of the final hidden state.

The reference runs any of them through Hugging Face. Models that the exporter cannot reproduce are refused here, so that
nobody trains for hours on a base that cannot be exported.
"""

from __future__ import annotations

from typing import Any

from chameleon_deploy.errors import UnsupportedBaseError

SUPPORTED_FAMILIES = ("gpt2", "llama")
# Groups of linear layers, by the parts of a name that tell them: all families call the halves of a block so.
LAYER_GROUPS = {"attention": ("attn.",), "mlp": ("mlp.",), "all": ("attn.", "mlp.", "lm_head")}

# Kinds of rotary embedding whose frequencies do not depend on the length of the text.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")

# Options of any family that change the logits or the attention, and their neutral values.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "final_logit_softcapping": (None,),
    "attn_logit_softcapping": (None,),
    "logit_scale": (None, 1.0),
    "logits_scaling": (None, 1.0),
    "sliding_window": (None,),
}
_FAMILY_NEUTRAL: dict[str, dict[str, tuple[Any, ...]]] = {
    "gpt2": {
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
        "activation_function": ("gelu_new",),
    },
    "llama": {"hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,)},
}


def num_key_value_heads(config: Any) -> int:
    """Return the number of key-value heads in a Hugging Face configuration; by default that of query heads."""
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def head_dim(config: Any) -> int:
    """Return the number of channels of a head in a Hugging Face configuration; by default the hidden size over the
    heads.
    """
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def require_supported(config: Any, name: str) -> None:
    """Raise UnsupportedBaseError, which names the unsupported family or options of a Hugging Face configuration.

    name  of the base model, for the message
    """
    family = config.model_type
    neutral = _NEUTRAL | _FAMILY_NEUTRAL.get(family, {})
    missing = [
        f"{option}={value!r}"
        for option, allowed in neutral.items()
        if (value := getattr(config, option, allowed[0])) not in allowed
    ]
    if (rope_type := _rope_type(config)) not in ROPE_TYPES:
        missing.append(f"rope_type={rope_type!r}")
    if family == "llama" and head_dim(config) % 16:  # GroupQueryAttention can rotate only these by position
        missing.append(f"head_dim={head_dim(config)}, no multiple of 16")
    if config.eos_token_id is None:
        missing.append("no eos_token_id")
    if family not in SUPPORTED_FAMILIES:
        also = f" (and {', '.join(missing)})" if missing else ""
        raise UnsupportedBaseError(
            f"{name!r} is of the family {family!r}{also}, which cannot be exported; "
            f"supported families: {', '.join(SUPPORTED_FAMILIES)}"
        )
    if missing:
        raise UnsupportedBaseError(f"{name!r}: a {family} with {', '.join(missing)} cannot be exported")


def _rope_type(config: Any) -> str:
    """Return the kind of rotary embedding: rope_parameters in transformers 5, rope_scaling in 4, type in older
    files.
    """
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    return str(rope.get("rope_type", rope.get("type", "default")))

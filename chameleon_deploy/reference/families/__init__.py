"""The base models that can be deployed: decoders whose logits are a linear map of the final hidden state.

A family is one module: a table of switches (`DecoderSpec`), which the reference, the graph builder and int8 read. The
reference runs any decoder through Hugging Face. Models that the exporter cannot reproduce are refused here, so that
nobody trains for hours on a base that cannot be exported.
"""

from __future__ import annotations

from typing import Any

from chameleon_deploy.errors import UnsupportedBaseError
from chameleon_deploy.reference.families.gemma2 import GEMMA2
from chameleon_deploy.reference.families.gemma3 import GEMMA3
from chameleon_deploy.reference.families.gpt2 import GPT2
from chameleon_deploy.reference.families.gpt_neox import GPT_NEOX
from chameleon_deploy.reference.families.granite import GRANITE
from chameleon_deploy.reference.families.llama import LLAMA
from chameleon_deploy.reference.families.mistral import MISTRAL
from chameleon_deploy.reference.families.olmo2 import OLMO2
from chameleon_deploy.reference.families.phi3 import PHI3
from chameleon_deploy.reference.families.qwen2 import QWEN2
from chameleon_deploy.reference.families.qwen3 import QWEN3
from chameleon_deploy.reference.families.smollm3 import SMOLLM3
from chameleon_deploy.reference.families.spec import DecoderSpec, Family, rope_type, rotary_embeddings

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (GPT2, LLAMA, MISTRAL, QWEN2, QWEN3, GRANITE, SMOLLM3, GPT_NEOX, OLMO2, PHI3, GEMMA2, GEMMA3)
}
# Groups of linear layers, by the parts of a name that tell them: all families call the halves of a block so.
LAYER_GROUPS = {
    "attention": ("attn.", "attention."),
    "mlp": ("mlp.",),
    "all": ("attn.", "attention.", "mlp.", "lm_head"),
}
ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope")
ROTATED = 16  # a multiple of how many channels of a head GroupQueryAttention rotates

# Decoders that are none: the options that tell them, and the reason for refusing them.
_OTHER_KINDS = {
    "a mixture of experts": ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    "a model of several modalities": ("vision_config", "audio_config", "text_config"),
    "an encoder-decoder": ("is_encoder_decoder",),
    "a recurrent model": (
        "state_size", "mamba_d_state", "ssm_cfg", "lru_width", "attention_hidden_size", "linear_num_key_heads",
        "conv_L_cache",
    ),
}  # fmt: skip


def decoder_spec(config: Any) -> DecoderSpec:
    """Return the switches of a Hugging Face configuration that `require_supported` accepts."""
    return FAMILIES[config.model_type].spec(config)


def require_supported(config: Any, name: str) -> None:
    """Raise UnsupportedBaseError, which names the unsupported family or options of a Hugging Face configuration.

    name  of the base model, for the message
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        kind = next((kind for kind, options in _OTHER_KINDS.items() if _has_any(config, options)), None)
        reason = f"{kind} of the family" if kind else "of the family"
        raise UnsupportedBaseError(
            f"{name!r} is {reason} {config.model_type!r}, which cannot be exported; "
            f"supported families: {', '.join(FAMILIES)}"
        )
    missing = [
        f"{option}={value!r}"
        for option, allowed in family.supported.items()
        if (value := getattr(config, option, allowed[0])) not in allowed
    ]
    types = [rope_type(options) for options in rotary_embeddings(config).values()]
    missing += [f"rope_type={found!r}" for found in types if found not in ROPE_TYPES]
    if config.eos_token_id is None:
        missing.append("no eos_token_id")
    if not missing:
        spec = family.spec(config)
        if any(layer.rotary for layer in spec.layers) and spec.rotary_dim % ROTATED:
            missing.append(f"a rotary embedding of {spec.rotary_dim} channels, no multiple of {ROTATED}")
    if missing:
        raise UnsupportedBaseError(f"{name!r}: a {family.name} with {', '.join(missing)} cannot be exported")


def _has_any(config: Any, options: tuple[str, ...]) -> bool:
    return any(getattr(config, option, None) for option in options)

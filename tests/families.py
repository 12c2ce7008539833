"""Small models of random weights, one of every family, with every switch that the family has."""

from __future__ import annotations

from typing import Any

import torch
import transformers

# 16 channels of a head at least are rotated; texts are longer than a window.
_COMMON = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None,
    "initializer_range": 0.15,  # with the usual 0.02, attention at this width would be nearly uniform
}  # fmt: skip
_GROUPED = {"num_key_value_heads": 2}
_GEMMA = _GROUPED | {
    "head_dim": 32, "query_pre_attn_scalar": 24, "sliding_window": 8, "tie_word_embeddings": True,
    "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip
_OPTIONS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_inner": 96},
    "llama": _GROUPED | {"attention_bias": True, "mlp_bias": True},
    "mistral": _GROUPED | {"head_dim": 32, "sliding_window": 8},
    "qwen2": _GROUPED | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "qwen3": _GROUPED | {"head_dim": 32, "tie_word_embeddings": True},
    "granite": _GROUPED | {"embedding_multiplier": 3.0, "attention_multiplier": 0.4, "residual_multiplier": 0.5,
                           "logits_scaling": 4.0},
    "smollm3": _GROUPED | {"no_rope_layers": [1, 0]},
    "gpt_neox": {"num_attention_heads": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                                                               "partial_rotary_factor": 0.5}},
    "olmo2": _GROUPED,
    "phi3": _GROUPED | {"head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "sliding_window": 8,
                        "original_max_position_embeddings": 64, "max_position_embeddings": 256, "rope_parameters": {
                            "rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.5,
                            "original_max_position_embeddings": 64, "short_factor": [1.5] * 8,
                            "long_factor": [4.0] * 8}},
    "gemma2": _GEMMA | {"attn_logit_softcapping": 4.0, "final_logit_softcapping": 3.0},
    "gemma3_text": _GEMMA,
}  # fmt: skip


def small_config(family: str, **changes: Any) -> Any:
    """Return the configuration of a family's small model."""
    return transformers.AutoConfig.for_model(family, **_COMMON | _OPTIONS[family] | changes)


def small_model(family: str, seed: int = 0, **changes: Any) -> Any:
    """Return a model whose norms and biases are not those of a new one, which would hide mistakes."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(small_config(family, **changes)).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.add_(torch.randn(parameter.shape) * 0.2)
    return model

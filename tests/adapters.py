"""PEFT adapters of random factors, made by peft itself, and what peft computes with them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

GPT2_LAYERS = ["c_attn", "c_proj", "c_fc"]
LLAMA_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def base_model(base: Path, vocabulary: int | None = None) -> Any:
    """Return a base in PyTorch, with as many rows of embedding and head if that is given."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    if vocabulary is not None:
        model.resize_token_embeddings(vocabulary, mean_resizing=False)
    return model


def save_adapter(
    base: Path, out: Path, seed: int = 0, strength: float = 0.15, vocabulary: int | None = None, **options: Any
) -> Path:
    """Write a PEFT directory for a base; options are of peft.LoraConfig. Neither factor is zero, and whatever else is
    trained differs from the base's.
    """
    import peft

    torch.manual_seed(seed)
    config = peft.LoraConfig(task_type="CAUSAL_LM", **options)
    model = peft.get_peft_model(base_model(base, vocabulary), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=strength)
            elif parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * strength)
    model.save_pretrained(out)
    return out


@torch.no_grad()
def peft_logits(
    base: Path, adapter: Path | None, rows: Sequence[Sequence[int]], vocabulary: int | None = None
) -> list[Any]:
    """Return peft's logits [tokens, vocab] of each row alone, with an adapter or with none."""
    import peft

    model = base_model(base, vocabulary)
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, adapter).eval()
    return [model(torch.tensor([list(ids)])).logits[0].numpy() for ids in rows]

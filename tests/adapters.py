"""PEFT adapters of random factors, made by peft itself, and what peft computes with them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

GPT2_LAYERS = ["c_attn", "c_proj", "c_fc"]
LLAMA_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def base_model(base: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


def save_adapter(base: Path, out: Path, seed: int = 0, strength: float = 0.15, **options: Any) -> Path:
    """Write a PEFT directory for a base; options are of peft.LoraConfig. Neither factor is zero."""
    import peft

    torch.manual_seed(seed)
    model = peft.get_peft_model(base_model(base), peft.LoraConfig(task_type="CAUSAL_LM", **options))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=strength)
    model.save_pretrained(out)
    return out


@torch.no_grad()
def peft_logits(base: Path, adapter: Path | None, rows: Sequence[Sequence[int]]) -> list[Any]:
    """Return peft's logits [tokens, vocab] of each row alone, with an adapter or with none."""
    import peft

    model = base_model(base)
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, adapter).eval()
    return [model(torch.tensor([list(ids)])).logits[0].numpy() for ids in rows]

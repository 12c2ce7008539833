"""What the layers of a trunk are made of, by one set of names for all families."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from chameleon_deploy.export.decoder import FAMILIES
from chameleon_deploy.reference.model import Trunk


@dataclass(frozen=True)
class Linear:
    """matrix  [in, out], a view of a parameter: what is written to it changes the model
    bias    [out], a view as well, or None"""

    matrix: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class Layer:
    """x += o(attention(q, k, v of norm_1(x))); x += down(activation(ups of norm_2(x)))

    readers  by the name of a matrix in the graph (gpt2.py, llama.py), a module whose input it is multiplied with
    """

    norm_1: Any
    norm_2: Any
    q: Linear
    k: Linear
    v: Linear
    o: Linear
    ups: list[Linear]
    down: Linear
    readers: dict[str, nn.Module]


def layers_of(trunk: Trunk) -> Iterator[Layer]:
    """The layers of a GPT-2 or a Llama, first to last."""
    if trunk.config.model_type == "gpt2":
        for i, block in enumerate(trunk.causal_lm.base_model.h):
            attn, mlp, name = block.attn, block.mlp, f"transformer.h.{i}"
            weights, biases = attn.c_attn.weight.chunk(3, 1), attn.c_attn.bias.chunk(3)
            q, k, v = (Linear(*part) for part in zip(weights, biases, strict=True))
            o, up, down = (Linear(linear.weight, linear.bias) for linear in (attn.c_proj, mlp.c_fc, mlp.c_proj))
            readers = {"attn.c_attn": attn.c_attn, "attn.c_proj": attn.c_proj,
                       "mlp.c_fc": mlp.c_fc, "mlp.c_proj": mlp.c_proj}  # fmt: skip
            yield Layer(block.ln_1, block.ln_2, q, k, v, o, [up], down, _named(name, readers))
        return
    for i, block in enumerate(trunk.causal_lm.base_model.layers):
        attn, mlp, name = block.self_attn, block.mlp, f"model.layers.{i}"
        q, k, v, o = (_linear(attn, part) for part in "qkvo")
        gate, up, down = (_linear(mlp, part) for part in ("gate", "up", "down"))
        readers = {"self_attn.qkv_proj": attn.q_proj, "self_attn.o_proj": attn.o_proj,
                   "mlp.gate_up_proj": mlp.gate_proj, "mlp.down_proj": mlp.down_proj}  # fmt: skip
        norm_1, norm_2 = block.input_layernorm, block.post_attention_layernorm
        yield Layer(norm_1, norm_2, q, k, v, o, [gate, up], down, _named(name, readers))


def last_norm(trunk: Trunk) -> nn.Module:
    """What gives the final hidden states."""
    _, name, _ = FAMILIES[trunk.config.model_type]
    norm: nn.Module = trunk.causal_lm.get_submodule(name)
    return norm


def _linear(of: Any, part: str) -> Linear:
    """PyTorch's linear layers have their weights as [out, in]."""
    linear = getattr(of, f"{part}_proj")
    return Linear(linear.weight.T, linear.bias)


def _named(layer: str, readers: dict[str, nn.Module]) -> dict[str, nn.Module]:
    return {f"{layer}.{name}.weight": module for name, module in readers.items()}

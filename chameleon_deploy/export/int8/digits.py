"""Which matrices take two int8 values per activation, by what one value costs.

Rounding the inputs x of a matrix to steps s adds to the KL divergence, to second order, half the mean over tokens of
g^2 s^2 / 12, summed over channels: g is the derivative of the log-probability of tokens drawn from the model itself
(their mean g^2 is the Fisher information). One backward pass over a little text gives g for all matrices, without the
noise of trying one after the other. In SmolLM2-135M, whose measured KL the sum predicts within a tenth, single matrices
cost a hundred times as much as others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from chameleon_deploy.export.hadamard import rotate
from chameleon_deploy.export.int8.calibration import INT8_MAX
from chameleon_deploy.export.int8.layers import Linear, layers_of
from chameleon_deploy.reference.model import Trunk
from chameleon_deploy.terminal.progress import Progress

TEXTS, TOKENS = 8, 256  # at most, of each
SHARE = 0.2  # of all multiplications with weights that may be done twice


def choose_two(trunk: Trunk, texts: Sequence[Tensor], report: Progress) -> frozenset[str]:
    """Return the graph's names of the matrices that take two int8 values per activation.

    trunk  rotated and scaled
    texts  int64 [texts, tokens] each
    """
    sizes = {
        name: size
        for layer in layers_of(trunk)
        for name, size in zip(
            layer.names, map(_size, ([layer.q, layer.k, layer.v], [layer.o], layer.ups, [layer.down])), strict=True
        )
    }
    budget = SHARE * (sum(sizes.values()) + trunk.head_weight.numel())
    return take_two(costs(trunk, texts, report), sizes, budget)


def _size(linears: Sequence[Linear]) -> int:
    return sum(linear.matrix.numel() for linear in linears)


def costs(trunk: Trunk, texts: Sequence[Tensor], report: Progress) -> dict[str, float]:
    """Return the KL divergence per token that one int8 value per activation costs, by the graph's name of a matrix.

    trunk  rotated and scaled
    """
    kl, hooks = dict[str, float](), []

    def watch(module: Any, inputs: Any, name: str, variance: Any) -> None:
        inputs[0].register_hook(partial(add, name, variance(inputs[0].detach())))

    def add(name: str, variance: Any, gradient: Tensor) -> None:
        kl[name] = kl.get(name, 0.0) + float((gradient.square() * variance).sum()) / 2

    fixed, by_row = (lambda x: 1 / 12), partial(_variance_of_rows, turn=False)
    for layer in layers_of(trunk):
        first, second = (by_row if norm is None else fixed for norm in (layer.norm_1, layer.norm_2))
        variances = first, by_row, second, partial(_variance_of_rows, turn=True)
        for name, module, variance in zip(layer.names, layer.readers, variances, strict=True):
            hooks.append(module.register_forward_pre_hook(partial(watch, name=name, variance=variance)))
    embedding = trunk.causal_lm.get_input_embeddings()
    hooks.append(embedding.register_forward_hook(lambda module, inputs, output: output.detach().requires_grad_()))
    generator, tokens = torch.Generator().manual_seed(0), 0
    with torch.enable_grad():
        for done, rows in enumerate(texts[:TEXTS]):
            report("weigh roundings", done, len(texts[:TEXTS]))
            hidden, _ = trunk.hidden_states(rows[:1, :TOKENS])
            logprobs = torch.log_softmax(trunk.logits(hidden[0]), -1)
            drawn = torch.multinomial(logprobs.detach().exp(), 1, generator=generator)
            logprobs.gather(1, drawn).sum().backward()
            tokens += len(drawn)
    report("weigh roundings", len(texts[:TEXTS]), len(texts[:TEXTS]))
    for hook in hooks:
        hook.remove()
    return {name: total / tokens for name, total in kl.items()}


def _variance_of_rows(x: Tensor, turn: bool) -> Tensor:
    """Return the variance of the rounding errors of each row with a scale of its own, [..., 1]."""
    return (rotate(x) if turn else x).abs().amax(-1, keepdim=True).div(INT8_MAX).square() / 12


def take_two(costs: Mapping[str, float], sizes: Mapping[str, int], budget: float) -> frozenset[str]:
    """Return the matrices whose second int8 value saves most for its time, within a budget of multiplications.

    costs  the KL divergence of one value, by name
    sizes  multiplications per token, by name
    """
    taken = set[str]()
    for name in sorted(costs, key=lambda name: costs[name] / sizes[name], reverse=True):
        if sizes[name] <= budget:
            taken.add(name)
            budget -= sizes[name]
    return frozenset(taken)

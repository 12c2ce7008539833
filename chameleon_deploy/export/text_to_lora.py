"""The graph of a released text-to-LoRA network: conditioning [factor_sets, size] -> the factors of every target.

The embeddings of depth and type reach the first layer through their norm only, so they are folded into its bias, one
for each layer of the base. The layers of the base are an axis of the products. A constant part of the factors is a bias
too, and alpha is multiplied into the head of lora_B.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import onnx_ir as ir
from torch import Tensor, nn

from chameleon_deploy.contract.bundle import factor_names
from chameleon_deploy.export.graph import integer, integers
from chameleon_deploy.reference.text_to_lora import TextToLora

Store = Callable[[str, Tensor], ir.Value]  # a tensor as an initializer, which is written once under its name


def text_to_lora_factors(
    op: Any, store: Store, network: TextToLora, conditioning: Any, alpha: float
) -> Iterator[tuple[str, Any]]:
    """Yield every factor tensor's name and its value [factor_sets, rank * width]."""
    latent = network.task.out_features
    task = op.Gemm(conditioning, store("task.weight", network.task.weight), store("task.bias", network.task.bias),
                   transB=1)  # fmt: skip
    task = op.Unsqueeze(_norm(op, store, "norm_task", network.norm_task, task), integers(op, [1]))
    first, second = network.mixer_layers()
    from_task = op.MatMul(task, store("mixer.0.weight", first.weight[:, :latent].T))  # [factor_sets, 1, 4 * width]
    places = network.place_embeddings() @ first.weight[:, latent:].T + first.bias
    names = [target.name for target in network.targets]
    for name in network.types:
        targets = network.targets_of(name)
        here = store(f"{name}.place", places[[names.index(target.name) for target in targets]])
        x = _silu(op, op.Add(from_task, here))  # [factor_sets, layers, 4 * width]
        x = _silu(op, _linear(op, store, "mixer.1", second, x))
        x = op.Add(x, _residual(op, store, "inner.0", network.inner[0], x))
        whole = None if network.is_shared else _to_head(op, store, network, x)
        for half in range(2):
            own = whole
            if own is None:
                told = network.half_norm(network.halves[f"{name}_{'AB'[half]}"])
                own = _to_head(op, store, network, op.Add(x, store(f"{name}.{'AB'[half]}", told)))
            weight, constant = network.head(name, half)
            scale = alpha if half else 1.0
            flat = op.MatMul(own, store(f"heads.{name}.{half}.weight", scale * weight.T))
            if bool(constant.any()):
                flat = op.Add(flat, store(f"heads.{name}.{half}.bias", scale * constant))
            for depth, target in enumerate(targets):
                yield factor_names(target.name)[half], op.Gather(flat, integer(op, depth), axis=1)


def _to_head(op: Any, store: Store, network: TextToLora, x: Any) -> Any:
    x = op.Add(x, _residual(op, store, "inner.1", network.inner[1], x))
    return _residual(op, store, "last", network.last, x)


def _residual(op: Any, store: Store, name: str, block: Any, x: Any) -> Any:
    x = _norm(op, store, f"{name}.norm", block.norm, x)
    x = _silu(op, _linear(op, store, f"{name}.first", block.first, x))
    return _silu(op, _linear(op, store, f"{name}.second", block.second, x))


def _linear(op: Any, store: Store, name: str, layer: Any, x: Any) -> Any:
    return op.Add(op.MatMul(x, store(f"{name}.weight", layer.weight.T)), store(f"{name}.bias", layer.bias))


def _norm(op: Any, store: Store, name: str, norm: nn.LayerNorm, x: Any) -> Any:
    weight, bias = store(f"{name}.weight", norm.weight), store(f"{name}.bias", norm.bias)
    return op.LayerNormalization(x, weight, bias, axis=-1, epsilon=norm.eps)


def _silu(op: Any, x: Any) -> Any:
    return op.Mul(x, op.Sigmoid(x))

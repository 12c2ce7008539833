"""The layers of a PyTorch model that a checkpoint adapts, each with an update of its own per row."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from chameleon_deploy.contract.bundle import factor_names
from chameleon_deploy.reference.checkpoint import Checkpoint
from chameleon_deploy.reference.inference import ReferenceAdaptation


class AdaptedLayers:
    """The targets of a checkpoint in a model, which this replaces by layers that add the update of each row."""

    def __init__(self, model: nn.Module, checkpoint: Checkpoint) -> None:
        self._layers: dict[str, _Adapted] = {}
        for name in checkpoint.config.targets:
            layer = self._layers[name] = _Adapted(model.get_submodule(name), checkpoint.config.alpha)
            model.set_submodule(name, layer)

    def set_factors(self, adaptation: ReferenceAdaptation) -> None:
        """Give every row of the next batch its factors, on the device and of the type of the layers' weights."""
        for target, layer in self._layers.items():
            layer.lora_A, layer.lora_B = (
                adaptation.factors[name][adaptation.factor_ids] for name in factor_names(target)
            )


class _Adapted(nn.Module):
    """A linear layer with an update per row: lora_A [batch, rank, in], lora_B [batch, out, rank]."""

    lora_A: Tensor
    lora_B: Tensor
    linear: Any  # of PyTorch, GPT-2's Conv1D, or torchao's

    def __init__(self, linear: nn.Module, alpha: float) -> None:
        super().__init__()
        self.linear, self.alpha = linear, alpha

    @property
    def weight(self) -> Tensor:
        weight: Tensor = self.linear.weight
        return weight

    def forward(self, x: Tensor) -> Tensor:
        update: Tensor = (x @ self.lora_A.transpose(1, 2)) @ self.lora_B.transpose(1, 2)
        y: Tensor = self.linear(x) + self.alpha * update
        return y

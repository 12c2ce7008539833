"""Training presets: the defaults of `train --preset NAME` and `compare --preset NAME`.

paper     arXiv 2502.04315 and its authors' scripts
residual  for text of clearly different kinds: one trained LoRA for all texts, and a counted correction of it for each
          cluster (reference/residual.py); optimiser steps over several clusters

This module imports nothing heavy, since the commands name the defaults in their help.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from chameleon_deploy.contract.manifest import LM_HEAD

PresetName = Literal["paper", "residual"]
Architecture = Literal["paper", "shared"]
MatmulPrecision = Literal["highest", "high", "medium"]


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """Settings of one training.

    batch_size        texts of one cluster that share their factors
    lr                learning rate of AdamW
    patience          epochs without a better validation loss before stopping
    cohorts_per_step  batches, of any clusters, in one step of the optimiser
    residual          whether the hypernetwork is built from a trained LoRA and counts (reference/residual.py)
    dropout           of the hypernetwork's hidden units
    matmul_precision  of PyTorch's products of float32 matrices (torch.set_float32_matmul_precision)
    """

    epochs: int
    batch_size: int
    lr: float
    patience: int
    cohorts_per_step: int
    residual: bool
    seed: int = 0
    dropout: float = 0.5
    matmul_precision: MatmulPrecision = "highest"


@dataclass(frozen=True, kw_only=True)
class Preset:
    """The shape of the factors, the clusters and the training.

    rank, alpha   of the factors
    num_clusters  of k-means
    max_length    tokens per text
    targets       the layers that are updated, by their names
    architecture  of the hypernetwork, see `CheckpointConfig`
    lora_lrs      learning rates that a comparison's LoRAs try, of which the validation texts choose one; none for that
                  of the training
    from_lora     whether a comparison's hypernetworks begin with the trained LoRA of their rank
    """

    rank: int
    alpha: float
    num_clusters: int
    max_length: int
    training: TrainingSettings
    targets: tuple[str, ...] = (LM_HEAD,)
    architecture: Architecture = "paper"
    lora_lrs: tuple[float, ...] = ()
    from_lora: bool = False

    def with_options(self, **options: Any) -> Preset:
        """Return a copy with the options that are not None, by the field names of `Preset` and `TrainingSettings`."""
        given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
        training = {name: given.pop(name) for name in list(given) if hasattr(self.training, name)}
        return replace(self, training=replace(self.training, **training), **given)

    def hidden_sizes(self, num_clusters: int) -> tuple[int, ...]:
        """Return the hidden sizes of a hypernetwork: the paper's, or one unit for each cluster."""
        return (num_clusters, num_clusters) if self.training.residual else (64, 32)


PRESETS: dict[PresetName, Preset] = {
    "paper": Preset(
        rank=4,
        alpha=1.0,
        num_clusters=8,
        max_length=256,
        training=TrainingSettings(epochs=10, batch_size=32, lr=5e-4, patience=2, cohorts_per_step=1, residual=False),
    ),
    "residual": Preset(
        rank=16,
        alpha=1.0,
        num_clusters=32,
        max_length=256,
        training=TrainingSettings(epochs=10, batch_size=8, lr=2e-3, patience=2, cohorts_per_step=4, residual=True),
    ),
}
PAPER = PRESETS["paper"]


def default_of(option: str) -> str:
    """Return the default of an option for a help text: one value, or each preset's."""
    values = {name: _value(preset, option) for name, preset in PRESETS.items()}
    if len(set(values.values())) == 1:
        return f"{values['paper']:g}"
    return ", ".join(f"{name}: {value:g}" for name, value in values.items())


def _value(preset: Preset, option: str) -> float:
    owner = preset if hasattr(preset, option) else preset.training
    return float(getattr(owner, option))

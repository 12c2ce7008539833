"""What export writes of a checkpoint's factors: their part of the manifest, and lora.safetensors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from chameleon_deploy.contract.bundle import AdaptationSpec, FloatArray, Parameters
from chameleon_deploy.reference.adapters import AdaptedBase
from chameleon_deploy.reference.checkpoint import Checkpoint
from chameleon_deploy.reference.hypernetwork import StaticLoRA, factor_set, num_parameters
from chameleon_deploy.reference.source import Source


def adaptation_spec(source: Source) -> AdaptationSpec:
    """Return the manifest's description of the factors."""
    if isinstance(source, AdaptedBase):
        return AdaptationSpec(
            regime="lora",
            rank=source.rank,
            alpha=1.0,
            targets=source.targets,
            num_clusters=0,
            protocol="masked",
            max_length=source.trunk.max_positions,
            adapters=tuple(source.adapters),
            base_digest=source.base_digest,
        )
    config = source.config
    return AdaptationSpec(
        regime=config.regime,
        rank=config.rank,
        alpha=config.alpha,
        targets=source.factors.targets,
        num_clusters=config.num_clusters,
        protocol=config.protocol,
        max_length=config.max_length,
        conditioning_size=config.conditioning_size,
    )


def parameter_counts(source: Source, spec: AdaptationSpec) -> Parameters:
    return Parameters(
        base=source.trunk.num_parameters(),
        factors=spec.rank * sum(spec.factor_widths.values()),
        hypernetwork=num_parameters(source.factors)
        if isinstance(source, Checkpoint) and spec.regime == "chameleon"
        else 0,
    )


def save_factors(source: Source, spec: AdaptationSpec, directory: Path) -> None:
    """Write the factors of adapters or of a LoRA, and the centroids, if there are any."""
    if isinstance(source, AdaptedBase):
        save_file(_stacked(source, spec), directory / "lora.safetensors")
        return
    if isinstance(source.factors, StaticLoRA):
        one_set = factor_set(source.factors(source.centroids.new_empty(1, 0)), 0, source.config.alpha)
        tensors = {name: np.ascontiguousarray(factor.numpy())[None] for name, factor in one_set.items()}
        save_file(tensors, directory / "lora.safetensors")
    if spec.num_clusters:
        save_file({"centroids": source.centroids.numpy()}, directory / "centroids.safetensors")


def _stacked(source: AdaptedBase, spec: AdaptationSpec) -> dict[str, FloatArray]:
    """Return the adapters' factors as one stack, zeros where an adapter has a smaller rank or another layer."""
    stacks = {}
    for name, width in spec.factor_widths.items():
        stack = stacks[name] = np.zeros((len(source.adapters), spec.rank, width), np.float32)
        for i, factors in enumerate(source.adapters.values()):
            if name in factors:
                stack[i, : len(factors[name])] = factors[name]
    return stacks

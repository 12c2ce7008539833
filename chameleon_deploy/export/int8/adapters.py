"""Calibration with factors: with them, activations may be larger than the base model's and would saturate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

import torch
from torch import Tensor

from chameleon_deploy.contract.adapter_file import Factors
from chameleon_deploy.contract.bundle import AdaptationSpec
from chameleon_deploy.errors import InputError
from chameleon_deploy.export.int8.basis import basis_of
from chameleon_deploy.export.int8.calibration import INT8_MAX, KEY_MARGIN, MARGIN, Extremes, Statistics, calibrate
from chameleon_deploy.reference.adapters import AdaptedBase, adapted
from chameleon_deploy.reference.hypernetwork import factor_set
from chameleon_deploy.reference.model import Trunk
from chameleon_deploy.reference.source import Source
from chameleon_deploy.reference.targets import in_head_alone
from chameleon_deploy.runtime.basis import enter_basis
from chameleon_deploy.terminal.progress import Progress


def calibrate_with_factors(
    trunk: Trunk,
    rotated: Trunk,
    spec: AdaptationSpec,
    sets: Sequence[Factors],
    texts: Sequence[Tensor],
    report: Progress,
) -> Statistics:
    """Return the statistics of the base model, with the extremes of all factor sets too.

    trunk, rotated  the base model, and its rotated form
    """
    statistics = calibrate(rotated, texts, report)
    unscaled = [_of_steps_of_one(seen) for seen in statistics.layers]
    tensors, shifts = basis_of(trunk, unscaled).of([target.name for target in spec.targets])
    for factors in sets:
        with adapted(rotated, enter_basis(factors, spec, tensors), shifts):
            other = calibrate(rotated, texts, report)
        pairs: list[tuple[Tensor, Tensor]] = []
        for seen, larger in zip(statistics.layers, other.layers, strict=True):
            pairs += zip(_values(seen), _values(larger), strict=True)
        for value, larger_value in pairs:
            torch.maximum(value, larger_value, out=value)
    return statistics


def known_sets(source: Source) -> list[Factors]:
    """Return the factor sets of the trunk that are known at export: those of adapters, of a LoRA, or of the centroids.

    Raises InputError for a hypernetwork of the trunk without centroids.
    """
    if isinstance(source, AdaptedBase):
        return list(source.adapters.values())
    config = source.config
    if in_head_alone(config.targets):
        return []  # the trunk's activations do not depend on them
    vectors = source.centroids if config.regime == "chameleon" else torch.empty(1, 0)
    if not len(vectors):
        raise InputError(
            "int8 scales of layers that a hypernetwork updates are measured with the factors of the centroids, and "
            "this checkpoint has none: export in fp32, fp16 or bf16"
        )
    factors = source.factors(vectors)
    sets = [factor_set(factors, k, config.alpha) for k in range(len(vectors))]
    return [{name: factor.numpy() for name, factor in one_set.items()} for one_set in sets]


def _of_steps_of_one(extremes: Extremes) -> Extremes:
    norm, keys, values = (torch.full_like(seen, INT8_MAX) for seen in (extremes.norm_1, extremes.keys, extremes.values))
    return Extremes(norm / MARGIN, norm / MARGIN, keys / KEY_MARGIN, values)


def _values(extremes: Extremes) -> list[Tensor]:
    return [getattr(extremes, field.name) for field in fields(extremes)]

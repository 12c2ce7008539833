"""Calibration with adapters, whose activations may be larger than the base model's and would saturate at its scales."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

import torch
from torch import Tensor

from chameleon_deploy.bundle import AdaptationSpec, ModelSpec
from chameleon_deploy.export.int8.basis import basis_of
from chameleon_deploy.export.int8.calibration import INT8_MAX, MARGIN, Extremes, Statistics, calibrate
from chameleon_deploy.progress import Progress
from chameleon_deploy.reference.adapters import Factors, adapted
from chameleon_deploy.reference.model import Trunk
from chameleon_deploy.runtime.basis import enter_basis


def calibrate_with_adapters(
    trunk: Trunk,
    rotated: Trunk,
    model: ModelSpec,
    spec: AdaptationSpec,
    adapters: Sequence[Factors],
    texts: Sequence[Tensor],
    report: Progress,
) -> Statistics:
    """Return the statistics of the base model, with the extremes of all adapters too.

    trunk, rotated  the base model, and its rotated form
    """
    statistics = calibrate(rotated, model, texts, report)
    unscaled = [_of_steps_of_one(seen) for seen in statistics.layers]
    tensors, shifts = basis_of(trunk, model, unscaled).of([target.name for target in spec.targets])
    for factors in adapters:
        with adapted(rotated, enter_basis(factors, spec, tensors), shifts):
            other = calibrate(rotated, model, texts, report)
        pairs = [(statistics.head, other.head)]
        for seen, larger in zip(statistics.layers, other.layers, strict=True):
            pairs += zip(_values(seen), _values(larger), strict=True)
        for value, larger_value in pairs:
            torch.maximum(value, larger_value, out=value)
    return statistics


def _of_steps_of_one(extremes: Extremes) -> Extremes:
    norm, cached = (torch.full_like(seen, INT8_MAX) for seen in (extremes.norm_1, extremes.keys))
    return Extremes(norm / MARGIN, norm / MARGIN, cached, cached)


def _values(extremes: Extremes) -> list[Tensor]:
    return [getattr(extremes, field.name) for field in fields(extremes)]

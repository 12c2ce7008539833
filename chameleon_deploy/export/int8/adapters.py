"""Calibration with adapters, whose activations may be larger than the base model's and would saturate at its scales."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

import torch
from torch import Tensor

from chameleon_deploy.bundle import AdaptationSpec, ModelSpec
from chameleon_deploy.export.families import family_of
from chameleon_deploy.export.int8.basis import basis_of
from chameleon_deploy.export.int8.calibration import INT8_MAX, MARGIN, Absmax, absmax_of_layers
from chameleon_deploy.export.int8.hadamard import rotate
from chameleon_deploy.reference.adapters import Factors, adapted
from chameleon_deploy.reference.model import Trunk
from chameleon_deploy.runtime.basis import enter_basis


def absmax_with_adapters(
    trunk: Trunk, rotated: Trunk, model: ModelSpec, spec: AdaptationSpec, adapters: Sequence[Factors]
) -> tuple[list[Absmax], Tensor]:
    """Return the absmax of every layer, of the base model and of all adapters, and of the rotated final hidden states
    [hidden] of the adapters alone.
    """
    layers, head = absmax_of_layers(rotated, model), torch.zeros(model.hidden_size)
    unscaled = [Absmax(*(torch.full_like(value, INT8_MAX) for value in _values(layer))) for layer in layers]
    tensors, shifts = basis_of(trunk, model, unscaled).of([target.name for target in spec.targets])

    def see(module: object, inputs: object, output: Tensor) -> None:
        torch.maximum(head, rotate(output).flatten(0, -2).abs().amax(0) * MARGIN, out=head)

    for factors in adapters:
        hook = family_of(model.architecture).last_norm_of(rotated).register_forward_hook(see)
        with adapted(rotated, enter_basis(factors, spec, tensors), shifts):
            for layer, other in zip(layers, absmax_of_layers(rotated, model), strict=True):
                for value, larger in zip(_values(layer), _values(other), strict=True):
                    torch.maximum(value, larger, out=value)
        hook.remove()
    return layers, head


def _values(absmax: Absmax) -> list[Tensor]:
    return [getattr(absmax, field.name) for field in fields(absmax)]

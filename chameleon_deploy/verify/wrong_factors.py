"""Wrong factors are caught: each must move a bundle's logits as far as it moves the reference's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from chameleon_deploy.contract.bundle import AdaptationSpec, FloatArray, Mode, factor_names
from chameleon_deploy.reference import inference
from chameleon_deploy.reference.inference import ReferenceAdaptation, RowLogits
from chameleon_deploy.reference.targets import in_head_alone
from chameleon_deploy.runtime import Runtime
from chameleon_deploy.runtime.factors import RowFactors
from chameleon_deploy.verify.gates import Check
from chameleon_deploy.verify.logit_checks import Rows, as_ours, row_logits, with_B
from chameleon_deploy.verify.logit_figures import (
    largest,
    max_abs,
)
from chameleon_deploy.verify.promises import given

CAUGHT = 0.5  # wrong factors must move logits by at least this share of what they move the reference's


Stacks = Mapping[str, Any]  # factor sets by tensor name: arrays of numpy or tensors of PyTorch
Fault = Callable[[AdaptationSpec, Stacks], Stacks]


def swapped_layers(spec: AdaptationSpec, stacks: Stacks) -> Stacks:
    """Every layer with the factors of the next layer of the same sizes."""
    changed = dict(stacks)
    for sizes in {(target.in_features, target.out_features) for target in spec.targets}:
        alike = [t.name for t in spec.targets if (t.in_features, t.out_features) == sizes]
        for layer, other in zip(alike, [*alike[1:], alike[0]], strict=True):
            changed |= {a: stacks[b] for a, b in zip(factor_names(layer), factor_names(other), strict=True)}
    return changed


def doubled_scaling(spec: AdaptationSpec, stacks: Stacks) -> Stacks:
    return {name: stack + stack if name.endswith(".lora_B") else stack for name, stack in stacks.items()}


FAULTS: dict[str, Fault] = {"layers swapped": swapped_layers, "scaling doubled": doubled_scaling}


def check_wrong_factors(runtime: Runtime, reference: RowLogits, rows: Rows) -> Iterator[Check]:
    """Wrong factors change the bundle's logits as much as they change the reference's.

    Like is compared with like: how far a mutation moves the logits of each model from its own right ones. So a coarse
    precision is not refused for being coarse, and a decoder that ignores its factors is caught in every precision.
    """
    mode: Mode = "request" if "request" in runtime.manifest.adaptation.modes else "static"
    vectors = given(runtime, mode, range(len(rows)))
    ours = runtime.adapt(rows, mode=mode, **vectors).factors
    theirs = inference.adapt(reference.checkpoint, rows, mode, **vectors)
    right, expected = list(row_logits(runtime, rows, ours)), _reference_logits(reference, rows, theirs)
    mutations = _mutations(ours, theirs)
    if not in_head_alone(reference.checkpoint.config.targets):
        mutations |= _faults(runtime, theirs, reference.checkpoint.config.alpha)
    for name, (wrong, theirs_wrong) in mutations.items():
        moved = largest(map(max_abs, row_logits(runtime, rows, wrong), right))
        must_move = largest(map(max_abs, _reference_logits(reference, rows, theirs_wrong), expected))
        if must_move > 0:
            yield Check(f"caught: {name}", moved / must_move, CAUGHT, at_least=True,
                        note=f"moves logits by {moved:.2g}, the reference's by {must_move:.2g}")  # fmt: skip
        else:
            yield Check(f"caught: {name}", moved, limit=None, note="not checked: it changes no logit of the reference")
    if len(ours.sets) < 2:
        for name in ("A and B of another row", "B of another row"):
            yield Check(f"caught: {name}", 0, limit=None, note=f"not checked: mode {mode} has one factor set")


def _faults(
    runtime: Runtime, theirs: ReferenceAdaptation, alpha: float
) -> dict[str, tuple[RowFactors, ReferenceAdaptation]]:
    """Faults of layers, planted before factors enter the basis of the bundle's layers."""
    spec, found = runtime.manifest.adaptation, {}
    for name, fault in FAULTS.items():
        wrong = replace(theirs, factors=dict(fault(spec, theirs.factors)))
        found[name] = as_ours(runtime, wrong, alpha), wrong
    return found


def _mutations(ours: RowFactors, theirs: ReferenceAdaptation) -> dict[str, tuple[RowFactors, ReferenceAdaptation]]:
    """The same faults of the factors of both models."""
    found = {"lora_B of the opposite sign": (with_B(ours, np.negative), theirs.with_B(torch.neg))}
    sets = len(ours.sets)
    if sets > 1:  # mode request: set i is row i's, in both
        following = (ours.factor_ids + 1) % sets
        found["A and B of another row"] = (
            replace(ours, factor_ids=following),
            replace(theirs, factor_ids=torch.from_numpy(following)),
        )
        found["B of another row"] = (
            with_B(ours, lambda lora_B: np.roll(lora_B, -1, axis=0)),
            theirs.with_B(lambda lora_B: lora_B.roll(-1, 0)),
        )
    return found


def _reference_logits(reference: RowLogits, rows: Rows, factors: ReferenceAdaptation) -> list[FloatArray]:
    return [reference(ids, factors, row).numpy() for row, ids in enumerate(rows)]

"""The numeric gates of a base model and its adapters: in a mixed batch every row is the base with its own adapter.

The reference computes each row alone, in PyTorch, with the adapter as its PEFT directory has it. In a bundle that takes
adapters later, random ones are written to files and loaded as a service loads them. Rows of activated adapters hold
their invocation twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any

import numpy as np

from chameleon_deploy.contract.adapter_file import Factors, write_adapter
from chameleon_deploy.contract.bundle import AdaptationSpec, FloatArray, IntArray, Mode, factor_names
from chameleon_deploy.reference.adapters import AdaptedBase, AdapterLogits, Place, first_place, last_place
from chameleon_deploy.runtime import Runtime
from chameleon_deploy.runtime.basis import enter_basis
from chameleon_deploy.runtime.factors import FactorSets, RowFactors
from chameleon_deploy.runtime.known_answers import adapt_rows, recorded_answers
from chameleon_deploy.terminal.progress import Progress
from chameleon_deploy.verify.checkpoint_checks import UPDATES, Steps, check_greedy, ragged_and_typical, run_steps
from chameleon_deploy.verify.data_checks import check_data
from chameleon_deploy.verify.gates import Check, Gate, accept, gate_of
from chameleon_deploy.verify.here import known_answer_checks
from chameleon_deploy.verify.logit_checks import (
    Rows,
    cache_checks,
    check_few,
    gate_checks,
    row_logits,
    update_difference,
)
from chameleon_deploy.verify.logit_figures import largest, max_abs
from chameleon_deploy.verify.promises import check_batching, check_neighbours, check_rerun, check_scores
from chameleon_deploy.verify.wrong_factors import CAUGHT, FAULTS, Fault, Stacks

PROBE = 0.05  # norm of a random adapter's update of a layer, relative to that of the layer's weight
INVOCATION_TOKENS = 2  # of a random adapter
FEW = 4  # texts that every single adapter, and none, is checked on


def verify_adapters(
    runtime: Runtime,
    reference: AdapterLogits,
    rows: Rows,
    whole: bool,
    report: Progress,
    max_kl: float | None = None,
    until: float = math.inf,
) -> list[Check]:
    """The checks of one decoder graph on real text. Arguments as in `verify_checkpoint`.

    reference  of a base with the bundle's adapters; where it has none and takes some later, with `random_adapters`
    """
    gate = gate_of(runtime.manifest.precision, runtime.provider, updates_trunk=True)
    if max_kl is not None:
        gate = accept(gate, max_kl)
    own = base = reference.base
    if not runtime.manifest.adaptation.adapters:
        load_adapters(runtime, base.adapters, base.invocations)
        own = replace(base, adapters={}, invocations={})
    everything, rows, typical = rows, *ragged_and_typical(rows)
    typical, few = typical[:FEW], rows[:8]
    served = [name for name in base.adapters if runtime.provider == "cpu" or name not in base.invocations]
    of_all, of_rows, of_few = (in_turn(served, len(part)) for part in (everything, rows, few))
    everything, rows, few = invoked(base, everything, of_all), invoked(base, rows, of_rows), invoked(base, few, of_few)
    # With the adapters that the reference has read these texts with.
    long, of_long = zip(*sorted(zip(everything, of_all, strict=True), key=lambda row: len(row[0]))[-8:], strict=True)

    def given(names: Sequence[str | None]) -> dict[str, Any]:
        return {"adapters": names} if base.adapters else {"mode": "none"}

    def factors(names: Sequence[str | None], texts: Rows) -> RowFactors:
        return runtime.adapt(texts, on_device=True, **given(names)).factors

    steps: Steps = {
        "logits": lambda: gate_checks(
            "mixed adapters:" if base.adapters else "base model:",
            runtime,
            reference,
            everything,
            factors(of_all, everything),
            of_all,
            gate,
        ),
        "cached decoding": lambda: cache_checks(runtime, reference, long, factors(of_long, long), of_long, gate),
        "batching": lambda: check_batching(runtime, rows, gate, **given(of_rows)),
        "scores": lambda: check_scores(runtime, few, gate, **given(of_few)),
        "reruns": lambda: check_rerun(runtime, few, **given(of_few)),
        "neighbours": lambda: check_neighbours(runtime, few, **given(of_few[:1])),
    }
    if base.adapters:
        alone = {f"adapter {name}": partial(check_adapter, runtime, reference, typical, gate, name) for name in served}
        steps |= {
            "mode none": lambda: check_none(runtime, reference, typical, gate),
            **alone,
            "wrong factors": lambda: check_wrong_factors(runtime, reference, few, of_few),
            "wrong places": lambda: check_wrong_places(runtime, reference, few, of_few),
        }
    if whole:
        steps |= {
            "data": lambda: check_data(runtime.bundle, own, gate),
            "known answers": lambda: check_known_answers(runtime, reference, gate),
        }
    if whole and own.adapters:
        steps["factors"] = lambda: check_factors(runtime, own)
    if whole and base.adapters:
        steps["factors alone"] = lambda: check_alone(runtime, few, of_few)
    return run_steps(runtime, steps, report, until)


def random_adapters(base: AdaptedBase) -> AdaptedBase:
    """Return a base with random adapters: one of all layers with the largest rank, one of every second layer with rank
    1, and an activated one of all layers with rank 1.
    """
    layers = {target.name: target for target in base.targets}
    ranks = {
        "random-all": (base.rank, list(layers)),
        "random-some": (1, list(layers)[::2]),
        "random-activated": (1, list(layers)),
    }
    adapters: dict[str, Factors] = {}
    for seed, (name, (rank, adapted)) in enumerate(ranks.items()):
        random = np.random.default_rng(seed)
        factors = adapters[name] = {}
        for layer in adapted:
            name_A, name_B = factor_names(layer)
            sizes, weight = layers[layer], base.trunk.causal_lm.get_submodule(layer).weight
            factors[name_A] = random.normal(size=(rank, sizes.in_features)).astype(np.float32)
            scale = PROBE * float(weight.square().mean().sqrt()) / math.sqrt(rank)
            factors[name_B] = (scale * random.normal(size=(rank, sizes.out_features))).astype(np.float32)
    invocation = tuple(np.random.default_rng(0).integers(base.trunk.spec.vocab_size, size=INVOCATION_TOKENS).tolist())
    return replace(base, adapters=adapters, invocations={"random-activated": invocation})


def load_adapters(
    runtime: Runtime, adapters: Mapping[str, Factors], invocations: Mapping[str, Sequence[int]] = MappingProxyType({})
) -> None:
    """Load adapters into a runtime from files, as a service loads them."""
    with TemporaryDirectory() as directory:
        for name, factors in adapters.items():
            file = Path(directory) / f"{name}.safetensors"
            write_adapter(file, factors, runtime.manifest.adaptation, invocations.get(name, ()))
            runtime.load_adapter(name, file)


def in_turn(adapters: Sequence[str], rows: int) -> list[str | None]:
    """The adapters and none, one row after the other."""
    names = [*adapters, None]
    return [names[row % len(names)] for row in range(rows)]


def invoked(base: AdaptedBase, rows: Rows, names: Sequence[str | None]) -> list[list[int]]:
    """Return rows of the same lengths that hold the invocation of their adapter twice, where it is activated and fits:
    at a third and at two thirds.
    """
    held = []
    for row, name in zip(rows, names, strict=True):
        ids, tokens = list(row), base.invocations.get(name or "", ())
        if tokens and len(ids) > 3 * len(tokens):
            for at in (len(ids) // 3, 2 * len(ids) // 3):
                ids[at : at + len(tokens)] = tokens
        held.append(ids)
    return held


def check_none(runtime: Runtime, reference: AdapterLogits, rows: Rows, gate: Gate) -> Iterator[Check]:
    """Rows in mode none are the base model."""
    logits = list(row_logits(runtime, rows, runtime.adapt(rows, mode="none").factors))
    yield from check_few("mode none against the base model:", logits, reference, rows, [None] * len(rows), gate)


def check_adapter(runtime: Runtime, reference: AdapterLogits, rows: Rows, gate: Gate, name: str) -> Iterator[Check]:
    """An adapter, beside rows of the base model, has the reference's logits, and its update is the reference's."""
    adapted, none = [name] * len(rows), [None] * len(rows)
    rows = invoked(reference.base, rows, adapted)
    both = runtime.adapt([*rows, *rows], adapters=[*adapted, *none]).factors
    logits = list(row_logits(runtime, [*rows, *rows], both))
    ours, base = logits[: len(rows)], logits[len(rows) :]
    yield from check_few(f"adapter {name}:", ours, reference, rows, adapted, gate)
    difference = update_difference(reference, rows, ours, base, adapted, none)
    if difference is None:
        yield Check(
            f"adapter {name}: update, relative difference", 0, limit=None, note="not checked: it changes no logit"
        )
    else:
        limit = UPDATES[runtime.manifest.precision]
        yield Check(f"adapter {name}: update, relative difference", difference, limit)


def check_known_answers(runtime: Runtime, reference: AdapterLogits, gate: Gate) -> Iterator[Check]:
    """The record of export is what this runtime computes, and its greedy tokens are the reference's."""
    yield from known_answer_checks(runtime)
    answers = recorded_answers(runtime.bundle)
    modes: tuple[Mode, ...] = ("none", "static") if runtime.manifest.adaptation.adapters else ("none",)
    for mode in modes:
        names = adapt_rows(runtime, mode, len(answers.rows)).adapters or [None] * len(answers.rows)
        yield check_greedy(mode, answers, reference, names, gate)


def check_factors(runtime: Runtime, base: AdaptedBase) -> Iterator[Check]:
    """The bundle's factors are those of the PEFT directories, in every precision."""
    spec, stacks = runtime.manifest.adaptation, runtime.bundle.lora()
    theirs = _stacks(base, spec)
    for i, adapter in enumerate(spec.adapters):
        difference = largest(max_abs(stacks[name][i], theirs[name][i]) for name in spec.factor_widths)
        yield Check(f"adapter {adapter}: factors, max abs difference", difference, 1e-6)


def check_alone(runtime: Runtime, rows: Rows, names: Sequence[str | None]) -> Iterator[Check]:
    """Promise F: a row's factors are the same bits, whatever stands beside it."""
    together, differences = runtime.adapt(rows, adapters=names).factors, []
    for row, ids in enumerate(rows):
        alone = runtime.adapt([ids], adapters=[names[row]]).factors.sets.tensors
        for name, array in together.sets[together.factor_ids[[row]]].tensors.items():
            own = np.asarray(alone[name])
            differences.append(max_abs(np.asarray(array)[:, : own.shape[1]], own))
    yield Check("promise F: factors of adapters alone and in a batch", largest(differences), 0)


def check_wrong_places(
    runtime: Runtime, reference: AdapterLogits, rows: Rows, names: Sequence[str | None]
) -> Iterator[Check]:
    """An update that begins at another place changes the bundle's logits as much as it changes the reference's."""
    if not reference.base.invocations:
        return
    found = runtime.adapt(rows, adapters=names, on_device=True).factors
    right = list(row_logits(runtime, rows, found))
    expected = [reference(ids, names, row).numpy() for row, ids in enumerate(rows)]
    for fault, place in PLACES.items():
        ours = row_logits(runtime, rows, replace(found, starts=_starts(reference.base, rows, names, place)))
        misplaced = AdapterLogits(reference.base, place)
        theirs = [misplaced(ids, names, row).numpy() for row, ids in enumerate(rows)]
        moved, must_move = largest(map(max_abs, ours, right)), largest(map(max_abs, theirs, expected))
        yield _caught(fault, moved, must_move)


def check_wrong_factors(
    runtime: Runtime, reference: AdapterLogits, rows: Rows, names: Sequence[str | None]
) -> Iterator[Check]:
    """Wrong factors change the bundle's logits as much as they change the reference's; see checks.py."""
    spec, order = runtime.manifest.adaptation, list(reference.base.adapters)
    their_stacks = _stacks(reference.base, spec)  # of one rank, like the bundle's: padding rounds differently
    stacks = runtime.bundle.lora() if spec.adapters else their_stacks

    def their_logits(stacks: Stacks) -> list[FloatArray]:
        named: dict[str, Factors] = {
            adapter: {n: stack[i] for n, stack in stacks.items()} for i, adapter in enumerate(order)
        }
        model = AdapterLogits(replace(reference.base, adapters=named))
        return [model(ids, names, row).numpy() for row, ids in enumerate(rows)]

    def our_logits(stacks: Stacks) -> Iterator[FloatArray]:
        return _logits(runtime, reference.base, rows, stacks, names)

    right, expected = list(our_logits(stacks)), their_logits(their_stacks)
    for fault, mutate in MUTATIONS.items():
        moved = largest(map(max_abs, our_logits(mutate(spec, stacks)), right))
        must_move = largest(map(max_abs, their_logits(mutate(spec, their_stacks)), expected))
        yield _caught(fault, moved, must_move)


def _caught(fault: str, moved: float, must_move: float) -> Check:
    """Return the check that a fault moves our logits as much as the reference's."""
    if must_move > 0:
        return Check(f"caught: {fault}", moved / must_move, CAUGHT, at_least=True,
                     note=f"moves logits by {moved:.2g}, the reference's by {must_move:.2g}")  # fmt: skip
    return Check(f"caught: {fault}", moved, limit=None, note="not checked: it changes no logit of the reference")


def another_adapter(spec: AdaptationSpec, stacks: Stacks) -> Stacks:
    """Every adapter with the factors of the next one."""
    return {name: np.roll(stack, -1, axis=0) for name, stack in stacks.items()}


PLACES: dict[str, Place] = {
    "an invocation found at its first place": first_place,
    "an update that begins one token late": lambda ids, tokens: last_place(ids, tokens) + 1,
}
MUTATIONS: dict[str, Fault] = {"another adapter": another_adapter, **FAULTS}


def _logits(
    runtime: Runtime, base: AdaptedBase, rows: Rows, stacks: Stacks, names: Sequence[str | None]
) -> Iterator[FloatArray]:
    """The bundle's logits with such factors of the base's adapters, and zeros after them for rows of none."""
    order = [*base.adapters, None]
    spec, basis = runtime.manifest.adaptation, runtime.bundle.basis()
    with_zeros = {name: np.concatenate([stack, np.zeros_like(stack[:1])]) for name, stack in stacks.items()}
    ids = np.array([order.index(name) for name in names], np.int64)
    sets = FactorSets(enter_basis(with_zeros, spec, basis))
    return row_logits(runtime, rows, RowFactors(sets, ids, _starts(base, rows, names, last_place)))


def _starts(base: AdaptedBase, rows: Rows, names: Sequence[str | None], place: Place) -> IntArray:
    """Where the update of each row begins."""
    tokens = [base.invocations.get(name or "", ()) for name in names]
    return np.array([place(ids, own) if own else 0 for ids, own in zip(rows, tokens, strict=True)], np.int64)


def _stacks(base: AdaptedBase, spec: AdaptationSpec) -> dict[str, FloatArray]:
    """The reference's factors in the layout of a bundle's, in the order of the adapters."""
    stacks = {}
    for name, width in spec.factor_widths.items():
        stack = stacks[name] = np.zeros((len(base.adapters), spec.rank, width), np.float32)
        for i, factors in enumerate(base.adapters.values()):
            if name in factors:
                stack[i, : len(factors[name])] = factors[name]
    return stacks

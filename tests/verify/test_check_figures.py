"""verify: a fault of a known size in a right decoder gives each check just that figure, and the others none.

The decoder, the bundle and the reference are real; only what a test plants is wrong.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any, get_args

import msgspec
import numpy as np
import pytest
import torch

from chameleon_deploy import Runtime
from chameleon_deploy.contract.bundle import FloatArray, Mode, Precision
from chameleon_deploy.reference import inference
from chameleon_deploy.reference.checkpoint import Checkpoint
from chameleon_deploy.reference.inference import RowLogits
from chameleon_deploy.runtime.decode.slots import Slots
from chameleon_deploy.runtime.factors import FactorSets, RowFactors
from chameleon_deploy.verify import checkpoint_checks, logit_checks, promises, wrong_factors
from chameleon_deploy.verify.gates import GATES, Check
from chameleon_deploy.verify.logit_figures import LogitFigures, max_abs

LENGTHS = (7, 12, 3, 1, 9, 20, 5, 8, 2, 6)
ROWS = [np.random.default_rng(row).integers(0, 512, length).tolist() for row, length in enumerate(LENGTHS)]
FEW, LONGEST = ROWS[:8], 5
FP32 = GATES["fp32"]
SIZE = 0.5  # of a planted fault
Rows = Any
Fault = Callable[[Rows, FloatArray], object]  # changes the logits [batch, positions, vocab] of a call in place


@pytest.fixture(scope="module")
def reference(mini: Checkpoint) -> RowLogits:
    return RowLogits(mini)


def plant(patch: pytest.MonkeyPatch, runtime: Runtime, fault: Fault, width: int = 100) -> None:
    """Make a fault part of the decoder, and let its logits come in pieces of at most `width` positions."""
    right = runtime.decoder.all_logits

    def wrong(rows: Rows, factors: RowFactors) -> Iterator[tuple[int, FloatArray]]:
        for start, piece in right(rows, factors):
            logits = np.array(piece)
            fault(rows, logits)
            for first in range(0, logits.shape[1], width):
                yield start + first, logits[:, first : first + width]

    patch.setattr(runtime.decoder, "all_logits", wrong)


def add(where: Callable[[Rows], bool], row: int = 0) -> Fault:
    """Add SIZE to a logit of a row in some calls."""

    def fault(rows: Rows, logits: FloatArray) -> None:
        logits[row, 0, 0] += SIZE * where(rows)

    return fault


def figures(checks: Iterable[Check]) -> dict[str, float]:
    """Return the figures by name; none may be there twice."""
    found = list(checks)
    assert len({check.name for check in found}) == len(found)
    return {check.name: check.value for check in found}


def missed(checks: Iterable[Check]) -> dict[str, float]:
    return figures(check for check in checks if not check.passed)


def scaled(patch: pytest.MonkeyPatch) -> None:
    """Let the scale of all logits be 4: a difference of 0.5 is an eighth of it."""
    for module in (checkpoint_checks, promises):
        patch.setattr(module, "logit_scale", lambda rows: 4.0)
    patch.setattr(LogitFigures, "scale", 4.0)


def nearly(value: float) -> Any:
    return pytest.approx(value, abs=2e-4)


def test_each_step_has_its_rows_and_its_gate(
    runtime: Runtime, lora_runtime: Runtime, mini: Checkpoint, mini_lora: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[tuple[Any, ...]] = []

    def note(name: str, *given: Any) -> list[Check]:
        called.append((name, *given))
        return []

    for name in [name for name in vars(checkpoint_checks) if name.startswith("check_")]:
        monkeypatch.setattr(checkpoint_checks, name, partial(note, name))
    rows = [[0] * (1 + row * 13 % 41) for row in range(41)]  # 32 ragged ones, 8 typical ones, and the last

    def steps(runtime: Runtime, checkpoint: Checkpoint, whole: bool, max_kl: float | None = None) -> dict[str, Any]:
        called.clear()
        assert (
            checkpoint_checks.verify_checkpoint(runtime, RowLogits(checkpoint), rows, whole, lambda *_: None, max_kl)
            == []
        )
        return {name: rest for name, _, *rest in called}

    parts = steps(runtime, mini, whole=True)
    few, batch, typical = rows[:8], [*rows[:32], rows[-1]], rows[32:40]
    logits = [(given[3], *given[4:]) for given in called if given[0] == "check_logits"]
    assert logits == [(rows, FP32, 1.0), (rows, FP32, 10.0)]
    assert list(map(len, parts["check_cache"][1])) == list(range(34, 42))
    assert parts["check_batching"] == [batch, FP32]
    assert parts["check_data"] == [mini, FP32]
    assert parts["check_adaptation"] == [mini, batch, FP32]
    assert parts["check_base"][1:] == [typical, FP32]
    assert parts["check_wrong_factors"][1] == parts["check_scores"][0] == few
    assert parts["check_rerun"] == parts["check_neighbours"] == parts["check_factors_alone"] == [few]
    assert parts["check_texts"][1] == [*few, rows[-1]]
    modes = [given[5] for given in called if given[0] == "check_mode"]
    assert modes == list(runtime.manifest.adaptation.modes)
    of_a_graph = steps(runtime, mini, whole=False, max_kl=4e-7)
    assert parts.keys() - of_a_graph.keys() == {
        "check_data", "check_known_answers", "check_adaptation", "check_encoder", "check_factors_alone", "check_mode",
        "check_texts",
    }  # fmt: skip
    assert of_a_graph["check_cache"][2].kl_mean == 4e-7
    coarse = msgspec.structs.replace(lora_runtime.manifest, precision="bf16")
    monkeypatch.setattr(lora_runtime, "manifest", coarse)
    steps(lora_runtime, mini_lora, whole=False)
    logits = [(given[3], *given[4:]) for given in called if given[0] == "check_logits"]
    assert logits == [(rows, GATES["bf16"], 1.0), (few, GATES["bf16"], 10.0)]


def test_steps_report_and_name_their_graph() -> None:
    reported: list[Any] = []
    steps: checkpoint_checks.Steps = {
        "one": lambda: iter([Check("a", 1, 2)]),
        "two": lambda: iter([Check("b", 3, None), Check("c", 4, 5)]),
    }
    runtime: Any = SimpleNamespace(graph="decoder")
    checks = checkpoint_checks.run_steps(runtime, steps, lambda *progress: reported.append(progress))
    assert [(check.name, check.value, check.graph) for check in checks] == [
        ("a", 1, "decoder"), ("b", 3, "decoder"), ("c", 4, "decoder")
    ]  # fmt: skip
    assert reported == [("verify decoder", done, 2) for done in (0, 1, 2)]
    left_out = checkpoint_checks.run_steps(runtime, steps, lambda *_: None, until=0.0)
    assert [(check.name, check.limit, check.passed) for check in left_out] == [
        ("left out: one", None, True), ("left out: two", None, True)
    ]  # fmt: skip


def test_ragged_and_typical_rows() -> None:
    rows = [[row] for row in range(57)]
    assert checkpoint_checks.ragged_and_typical(rows) == ([*rows[:32], rows[56]], rows[32:40])
    assert checkpoint_checks.ragged_and_typical(rows[:33]) == (rows[:33], rows[:8])


def test_adaptation(
    runtime: Runtime, lora_runtime: Runtime, mini: Checkpoint, mini_lora: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    embeddings, clusters, factors = (
        "embeddings, max abs difference",
        "cluster ids that differ",
        "factors, relative difference",
    )
    limits = {embeddings: FP32.embedding_tolerance, clusters: 0, factors: FP32.factor_tolerance}
    checks = list(checkpoint_checks.check_adaptation(runtime, mini, FEW, FP32))
    assert all(check.passed for check in checks)
    assert {check.name: check.limit for check in checks} == limits
    of_trained_factors = figures(checkpoint_checks.check_adaptation(lora_runtime, mini_lora, FEW, FP32))
    assert of_trained_factors.keys() | {clusters} == limits.keys()
    assert max(of_trained_factors.values()) == nearly(0)

    adapt = runtime.adapt

    def shifted(rows: Rows, **arguments: Any) -> Any:
        found = adapt(rows, **arguments)
        tensors = {name: array + np.abs(array).max() * SIZE for name, array in found.factors.sets.tensors.items()}
        return dataclasses.replace(
            found, embeddings=found.embeddings + SIZE, cluster_ids=found.cluster_ids + 1,
            factors=dataclasses.replace(found.factors, sets=FactorSets(tensors)),
        )  # fmt: skip

    monkeypatch.setattr(runtime, "adapt", shifted)
    wrong = missed(checkpoint_checks.check_adaptation(runtime, mini, FEW, FP32))
    assert wrong == {embeddings: nearly(SIZE), clusters: len(FEW), factors: nearly(SIZE)}


def test_clusters_are_compared_where_the_margin_is_clear(
    runtime: Runtime, mini: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Squared distances of three texts from the centroids: 0, 4, 49; 1, 1, 36; 4, 0, 25."""
    texts, centroids = torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[0.0], [2.0], [7.0]])
    right, theirs = inference.adapt(mini, FEW[:3], "request"), torch.tensor([0, 0, 1])
    right = dataclasses.replace(right, embeddings=texts, cluster_ids=theirs)
    ours = dataclasses.replace(runtime.adapt(FEW[:3], mode="request"), embeddings=texts.numpy())
    monkeypatch.setattr(inference, "adapt", lambda *_, **__: right)

    def differ(cluster_ids: list[int], margin: float, num_centroids: int) -> list[tuple[float, str]]:
        found = dataclasses.replace(ours, cluster_ids=np.array(cluster_ids))
        monkeypatch.setattr(runtime, "adapt", lambda *_, **__: found)
        checkpoint = dataclasses.replace(mini, centroids=centroids[:num_centroids])
        checks = checkpoint_checks.check_adaptation(
            runtime, checkpoint, FEW[:3], dataclasses.replace(FP32, cluster_margin=margin)
        )
        return [(check.value, check.note.partition(" ")[0]) for check in checks if "cluster" in check.name]

    assert differ([0, 1, 1], 0, 2) == [(0, "2")]  # the one between two centroids may have either
    assert differ([1, 1, 1], 0, 3) == [(1, "2")]
    assert differ([1, 1, 0], 3.5, 3) == [(2, "2")]
    assert differ([1, 1, 0], 4, 3) == [(0, "0")]  # no margin is larger
    assert differ([0, 0, 0], 0, 1) == []


@pytest.mark.parametrize("precision", get_args(Precision))
@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_logits_are_limited_with_a_precisions_own_factors(
    scale: float, precision: Precision, runtime: Runtime, reference: RowLogits
) -> None:
    gate = GATES[precision]
    checks = list(checkpoint_checks.check_logits(runtime, reference, FEW, gate, scale))
    assert all(check.passed for check in checks)
    assert max(check.value for check in checks if not check.at_least) < 1e-3  # as factors of the same strength
    limits = [gate.max_abs_logit, gate.top1_agreement, gate.kl_mean, gate.kl_p999, gate.perplexity]
    assert [check.limit for check in checks] == (limits if scale == 1 or precision == "fp32" else [None] * 5)


def test_an_update_of_the_trunk_is_limited_with_its_own_factors(
    runtime: Runtime, reference: RowLogits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_checks, "in_head_alone", lambda targets: False)
    plant(monkeypatch, runtime, add(lambda rows: True))
    assert "x1 factors: logits, max abs difference" in missed(
        checkpoint_checks.check_logits(runtime, reference, FEW, FP32, 1.0)
    )
    scaled_ten_times = list(checkpoint_checks.check_logits(runtime, reference, FEW, FP32, 10.0))
    assert [check.limit for check in scaled_ten_times] == [None] * 5
    assert scaled_ten_times[0].value > 5e-4  # reported all the same


@pytest.mark.parametrize("width", [3, 100])
def test_the_five_figures_of_the_gate(
    width: int, runtime: Runtime, reference: RowLogits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are those of all positions of all texts, computed text by text."""
    scaled(monkeypatch)
    noise = np.random.default_rng(0).normal(size=(max(LENGTHS), 512)).astype(np.float32) / 20
    ours, theirs = _ours(runtime, FEW), _theirs(reference, FEW)
    right = list(logit_checks.row_logits(runtime, FEW, ours))
    plain = LogitFigures()
    for row, ids in enumerate(FEW):
        actual, expected = torch.from_numpy(right[row] + noise[: len(ids)]), reference(ids, theirs, row)
        plain.add(actual, expected, torch.tensor(ids[1:], dtype=torch.int64))

    def fault(rows: Rows, logits: FloatArray) -> None:
        logits += noise[: logits.shape[1]]

    plant(monkeypatch, runtime, fault, width)
    gaps = torch.cat(plain._gaps).sort().values / plain.scale
    kl, (ours_nll, their_nll) = torch.cat(plain.kl), plain.nll
    for clear in (1, 30):
        gate = dataclasses.replace(FP32, top1_gap=float(gaps[-clear - 1 : len(gaps) - clear + 1].mean()))
        checks = list(logit_checks.gate_checks("x", runtime, reference, FEW, ours, theirs, gate))
        assert plain.top1(gate.top1_gap)[0] == clear
        assert plain.top1(gate.top1_gap)[1] > 0
        assert [(check.name, check.value) for check in checks] == [
            ("x logits, max abs difference", nearly(plain.max_abs / 4)),
            ("x top-1 agreement", plain.top1(gate.top1_gap)[1] / clear),
            ("x KL, mean", nearly(float(kl.mean()))),
            ("x KL, 99.9th percentile", nearly(float(kl.quantile(0.999)))),
            ("x perplexity, relative difference", nearly(abs(math.expm1((ours_nll - their_nll) / plain.targets)))),
        ]
        assert [check.at_least for check in checks] == [False, True, False, False, False]


def _ours(runtime: Runtime, rows: Rows) -> RowFactors:
    return runtime.adapt(rows, mode="request", on_device=True).factors


def _theirs(reference: RowLogits, rows: Rows) -> inference.ReferenceAdaptation:
    return inference.adapt(reference.checkpoint, rows, "request")


@pytest.mark.parametrize(("shortest", "positions"), [(12, 7), (3, 3), (1, 1)])
def test_cached_decoding_begins_in_the_middle_of_the_shortest_text(
    shortest: int, positions: int, runtime: Runtime, reference: RowLogits, monkeypatch: pytest.MonkeyPatch
) -> None:
    scaled(monkeypatch)
    rows = [ROWS[5][:shortest], ROWS[5][::-1]]
    check = partial(
        logit_checks.cache_checks, runtime, reference, rows, _ours(runtime, rows), _theirs(reference, rows), FP32
    )
    right = list(check())
    assert all(check.passed for check in right)
    in_default_mode = list(checkpoint_checks.check_cache(runtime, reference, rows, FP32))
    assert all(check.passed for check in in_default_mode)
    assert [check.name for check in in_default_mode] == [check.name for check in right]
    assert right[0].note == f"{2 * positions} positions"
    step = Slots.step

    def wrong(*arguments: Any) -> FloatArray:
        logits = np.array(step(*arguments))
        logits[1, 0] += SIZE
        return logits

    monkeypatch.setattr(Slots, "step", wrong)
    found = missed(check())
    assert len(found) == (5 if shortest > 1 else 0)
    assert all(value == nearly(SIZE / 4) for name, value in found.items() if "KL" not in name)


@pytest.mark.parametrize("checked", [promises.check_batching, promises.check_scores])
def test_a_right_decoder_keeps_rows_apart(checked: Any, runtime: Runtime) -> None:
    assert missed(checked(runtime, ROWS, FP32, mode="request")) == {}
    assert missed(checked(runtime, ROWS, FP32)) == {}


def in_a_batch_of(size: int) -> Fault:
    """In the right order, and not beside a long row."""
    return add(lambda rows: len(rows) == size and rows[0] == FEW[0] and len(rows[-1]) < LENGTHS[LONGEST], row=-1)


BATCHING: dict[str, tuple[str, Fault]] = {
    **{f"a batch of {size}": ("batch sizes 1, 2, 3, 4, 8, 32", in_a_batch_of(size)) for size in (2, 3, 4, 8, 10)},
    "the last row first": ("row order", add(lambda rows: len(rows) == 8 and rows[0] == FEW[7])),
    "a long row beside it": ("padding", add(lambda rows: len(rows[-1]) == LENGTHS[LONGEST])),
}


@pytest.mark.parametrize("fault", BATCHING)
def test_rows_that_depend_on_their_batch(fault: str, runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    name, planted = BATCHING[fault]
    scaled(monkeypatch)
    plant(monkeypatch, runtime, planted)
    checks = list(promises.check_batching(runtime, ROWS, FP32, mode="request"))
    assert missed(checks) == {f"{name}, max abs difference": nearly(SIZE / 4)}
    if name.startswith("batch"):
        size = fault.removeprefix("a batch of ").replace("10", "32")
        assert checks[0].note.endswith(f"worst at {size}")


def test_scores_that_are_not_of_the_logits(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    scaled(monkeypatch)
    right = runtime.score

    def wrong(rows: Rows, **arguments: Any) -> Any:
        first, *others = right(rows, **arguments)
        return [dataclasses.replace(first, token_logprobs=[value - SIZE for value in first.token_logprobs]), *others]

    monkeypatch.setattr(runtime, "score", wrong)
    assert missed(promises.check_scores(runtime, FEW, FP32)) == {
        "scores against logits, max abs difference": nearly(SIZE / 4)
    }


@pytest.mark.parametrize(
    "checked",
    [
        partial(promises.check_batching, gate=FP32),
        partial(promises.check_scores, gate=FP32),
        promises.check_rerun,
        promises.check_neighbours,
    ],
)
def test_a_caller_says_how_rows_are_adapted(checked: Any, runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    right, modes = runtime.adapt, set[Any]()

    def adapt(rows: Rows, **arguments: Any) -> Any:
        modes.add(arguments.get("mode"))
        return right(rows, **arguments)

    monkeypatch.setattr(runtime, "adapt", adapt)
    assert missed(checked(runtime, rows=FEW, mode="centroid")) == {}
    assert modes == {"centroid"}


def test_a_base_model_that_is_another(runtime: Runtime, reference: RowLogits, monkeypatch: pytest.MonkeyPatch) -> None:
    checks = list(checkpoint_checks.check_base(runtime, reference, FEW, FP32))
    assert all(check.passed for check in checks)
    assert [check.limit for check in checks] == [FP32.max_abs_logit, FP32.kl_mean, FP32.kl_p999, 0]
    scaled(monkeypatch)
    right = runtime.decoder.all_logits

    def wrong(rows: Rows, factors: RowFactors) -> Iterator[tuple[int, FloatArray]]:
        """The base model is right as mode none calls it, with one set of zeros of rank 1."""
        for start, piece in right(rows, factors):
            logits = np.array(piece)
            logits[0, 0, 0] += SIZE * (len(factors.sets) > 1)
            yield start, logits

    monkeypatch.setattr(runtime.decoder, "all_logits", wrong)
    assert missed(checkpoint_checks.check_base(runtime, reference, FEW, FP32)) == {
        "alpha 0 against mode none": nearly(SIZE)
    }
    plant(monkeypatch, runtime, add(lambda rows: True, row=1))
    found, name = (
        missed(checkpoint_checks.check_base(runtime, reference, FEW, FP32)),
        "mode none against the base model",
    )
    assert found.pop(f"{name}: logits, max abs difference") == nearly(SIZE / 4)
    assert found.keys() == {"alpha 0 against mode none", f"{name}: KL, mean", f"{name}: KL, 99.9th percentile"}


OF_A_MODE = {
    "factors, relative difference": FP32.factor_tolerance,
    "logits, max abs difference": FP32.max_abs_logit,
    "KL, mean": FP32.kl_mean,
    "KL, 99.9th percentile": FP32.kl_p999,
    "update, relative difference": 0.05,
    "scores against logits, max abs difference": FP32.summation_order_tolerance,
    "scores against scores with the factors of adapt": 0,
}


@pytest.mark.parametrize("mode", get_args(Mode))
def test_a_mode(mode: Mode, runtime: Runtime, reference: RowLogits, monkeypatch: pytest.MonkeyPatch) -> None:
    check = partial(checkpoint_checks.check_mode, runtime, reference, FEW, FP32, mode)
    checks = list(check())
    assert all(check.passed for check in checks)
    limits = {check.name.removeprefix(f"mode {mode}: "): check.limit for check in checks}
    updates = {"update, relative difference"} if mode != "none" else set()
    assert limits == {name: limit for name, limit in OF_A_MODE.items() if "update" not in name or name in updates}

    scaled(monkeypatch)
    plant(monkeypatch, runtime, add(lambda rows: True, row=1))
    found = {name.removeprefix(f"mode {mode}: "): value for name, value in missed(check()).items()}
    assert found.pop("logits, max abs difference") == nearly(SIZE / 4)
    assert found.keys() == {"KL, mean", "KL, 99.9th percentile"}  # of a probability it is next to nothing


@pytest.mark.parametrize("fault", ["factors", "scores"])
def test_a_mode_with_wrong(fault: str, runtime: Runtime, reference: RowLogits, monkeypatch: pytest.MonkeyPatch) -> None:
    scaled(monkeypatch)
    adapt, score = runtime.adapt, runtime.score

    def stronger(rows: Rows, *, mode: Any, on_device: bool = False, **arguments: Any) -> Any:
        found = adapt(rows, mode=mode, **arguments)
        return (
            found
            if on_device
            else dataclasses.replace(found, factors=logit_checks.with_B(found.factors, lambda B: B * 1.5))
        )

    def likelier(rows: Rows, **arguments: Any) -> Any:
        first, *others = score(rows, **arguments)
        return [dataclasses.replace(first, token_logprobs=[value + SIZE for value in first.token_logprobs]), *others]

    if fault == "factors":
        monkeypatch.setattr(runtime, "adapt", stronger)
    else:
        monkeypatch.setattr(runtime, "score", likelier)
    found = missed(checkpoint_checks.check_mode(runtime, reference, FEW, FP32, "request"))
    values = {name.removeprefix("mode request: "): value for name, value in found.items()}
    if fault == "factors":
        assert values["factors, relative difference"] == nearly(0.5)
        assert values["update, relative difference"] == nearly(0.5)
    else:
        assert values == {
            "scores against logits, max abs difference": nearly(SIZE / 4),
            "scores against scores with the factors of adapt": nearly(SIZE),
        }


@pytest.mark.parametrize("precision", get_args(Precision))
def test_an_update_is_limited(
    precision: Precision, runtime: Runtime, reference: RowLogits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every precision where the head alone is updated, and not in int8 where layers of the trunk are."""
    monkeypatch.setattr(runtime, "manifest", msgspec.structs.replace(runtime.manifest, precision=precision))

    def update(mode: Mode) -> Check | None:
        found = [
            c
            for c in checkpoint_checks.check_mode(runtime, reference, FEW, GATES[precision], mode)
            if "update" in c.name
        ]
        return found[0] if found else None

    check = update("request")
    assert check
    assert check.limit == (0.2 if precision == "int4" else 0.05)
    monkeypatch.setattr(checkpoint_checks, "in_head_alone", lambda targets: False)
    check = update("request")
    assert check
    assert check.limit == {"fp32": 0.05, "fp16": 0.05, "bf16": 0.2, "int8": None, "int4": None}[precision]
    monkeypatch.setattr(checkpoint_checks, "update_difference", lambda *_: None)
    check = update("request")
    assert check
    assert (check.value, check.limit, check.note) == (0, None, "not checked: it changes no logit")
    assert update("none") is None


def test_a_rerun_that_differs(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [(check.value, check.limit) for check in promises.check_rerun(runtime, FEW)] == [(0, 0)]
    calls = itertools.count()
    plant(monkeypatch, runtime, add(lambda rows: next(calls) == 1))
    assert missed(promises.check_rerun(runtime, FEW)) == {"promise R: rerun, max abs difference": nearly(SIZE)}


def test_a_neighbours_text_that_matters(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [(check.value, check.limit) for check in promises.check_neighbours(runtime, FEW)] == [(0, 0)]
    plant(monkeypatch, runtime, add(lambda rows: rows[0] != rows[1]))
    assert missed(promises.check_neighbours(runtime, FEW)) == {"a neighbour's text: max abs difference": nearly(SIZE)}


def test_a_neighbours_text_is_another_at_every_position(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    texts: list[Rows] = []
    plant(monkeypatch, runtime, lambda rows, logits: texts.append(rows))
    row = [0, 511, 1, 510, 256, 255, 7, 3]  # just long enough
    assert missed(promises.check_neighbours(runtime, [[5] * 7, row, [5] * 20])) == {}
    (one, same), (other, edited) = texts
    assert row == one == same == other
    assert all(i != j and 0 <= j < 512 for i, j in zip(row, edited, strict=True))


def test_factors_that_depend_on_the_batch(
    runtime: Runtime, lora_runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "promise F: mode {}, factors alone and in a batch".format
    right = list(promises.check_factors_alone(runtime, FEW))
    assert [(check.name, check.value, check.limit) for check in right] == [
        (name(mode), 0, 0) for mode in ("none", "centroid", "request")
    ]
    assert [check.name for check in promises.check_factors_alone(lora_runtime, FEW)] == [name("none")]
    adapt = runtime.adapt

    def wrong(rows: Rows, *, mode: Mode) -> Any:
        found = adapt(rows, mode=mode)
        shift = SIZE * (mode == "request" and len(rows) > 1)
        return dataclasses.replace(found, factors=logit_checks.with_B(found.factors, lambda B: B + shift))

    monkeypatch.setattr(runtime, "adapt", wrong)
    assert missed(promises.check_factors_alone(runtime, FEW)) == {name("request"): nearly(SIZE)}


@pytest.mark.parametrize("rows", [FEW, FEW[:2]])
def test_wrong_factors_move_a_right_bundle_as_far(rows: Rows, runtime: Runtime, reference: RowLogits) -> None:
    checks = list(wrong_factors.check_wrong_factors(runtime, reference, rows))
    names = ["lora_B of the opposite sign", "A and B of another row", "B of another row"]
    assert [check.name for check in checks] == [f"caught: {name}" for name in names]
    for check in checks:
        assert (check.limit, check.at_least) == (0.5, True)
        assert check.value == pytest.approx(1, rel=1e-3)


def test_wrong_factors_that_cannot_be_planted(
    runtime: Runtime, lora_runtime: Runtime, mini: Checkpoint, mini_lora: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    opposite, *others = wrong_factors.check_wrong_factors(lora_runtime, RowLogits(mini_lora), FEW)
    assert opposite.value == pytest.approx(1, rel=1e-3)
    note = "not checked: mode static has one factor set"
    assert others == [
        Check(f"caught: {name}", 0, None, note=note) for name in ("A and B of another row", "B of another row")
    ]
    monkeypatch.setattr(wrong_factors, "_reference_logits", lambda reference, rows, factors: [np.zeros(1)] * len(rows))
    checks = list(wrong_factors.check_wrong_factors(runtime, RowLogits(mini), FEW))
    assert len(checks) == 3
    for check in checks:
        assert (check.limit, check.note) == (None, "not checked: it changes no logit of the reference")
        assert check.value > 0  # what it moves in the bundle


def test_pieces_of_rows_are_the_rows(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    factors = _ours(runtime, FEW)
    whole = list(logit_checks.row_logits(runtime, FEW, factors))
    assert [logits.shape for logits in whole] == [(len(ids), 512) for ids in FEW]
    plant(monkeypatch, runtime, lambda rows, logits: None, width=6)
    for tokens in (1, 30, 1000):
        found: list[list[FloatArray]] = [[] for _ in FEW]
        for row, start, logits in logit_checks.logits_pieces(runtime, FEW, factors, tokens):
            assert start == sum(map(len, found[row]))
            assert len(logits)
            found[row].append(logits)
        for pieces, expected in zip(found, whole, strict=True):
            np.testing.assert_allclose(np.concatenate(pieces), expected, atol=1e-4)
    for logits, expected in zip(logit_checks.row_logits(runtime, FEW, factors), whole, strict=True):
        assert max_abs(logits, expected) == 0


def test_b_is_changed_and_nothing_else() -> None:
    tensors = {"t.lora_A": np.ones((1, 2, 3)), "t.lora_B": np.ones((1, 2, 5))}
    changed = logit_checks.with_B(RowFactors(FactorSets(tensors), np.zeros(1, np.int64)), np.negative).sets.tensors
    assert [float(np.asarray(changed[name]).sum()) for name in tensors] == [6, -10]

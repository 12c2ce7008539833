"""verify: passes on a right bundle, and misses a gate on every kind of wrong one."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import torch

import chameleon_deploy
from chameleon_deploy import Runtime
from chameleon_deploy.contract.bundle import Mode, Precision, open_bundle
from chameleon_deploy.reference.checkpoint import Checkpoint
from chameleon_deploy.reference.inference import RowLogits
from chameleon_deploy.runtime.factors import check_factors
from chameleon_deploy.verify import checkpoint_checks, logit_checks, promises, wrong_factors
from chameleon_deploy.verify.gates import GATES, Check, accept
from chameleon_deploy.verify.logit_figures import LogitFigures, largest, logit_scale
from chameleon_deploy.verify.promises import check_texts
from chameleon_deploy.verify.run import VerifyOptions, verification_rows, verify_bundle
from tests.commands import call
from tests.damage import change_weights, edit, reseal
from tests.rows import head_factors
from tests.verification import CACHE_FAULTS, damage_cache, missed, quiet

# Every check of a bundle of fp32 and its limit, those of a decoder graph first: none may go without a word.
FEW = {"logits, max abs difference": 5e-4, "KL, mean": 1e-7, "KL, 99.9th percentile": 1e-5}
FIGURES = {**FEW, "top-1 agreement": 1.0, "perplexity, relative difference": 1e-4}
OF_A_GRAPH = {
    **{f"x{scale} factors: {name}": limit for scale in (1, 10) for name, limit in FIGURES.items()},
    "cached decoding, max abs difference": 5e-4,
    "cached decoding: KL, mean": 1e-7,
    "cached decoding: KL, 99.9th percentile": 1e-5,
    "cached decoding against the text read whole: KL, mean": 1e-7,
    "cached decoding against the text read whole: KL, 99.9th percentile": 1e-5,
    "batch sizes 1, 2, 3, 4, 8, 32, max abs difference": 5e-4,
    "row order, max abs difference": 5e-4,
    "padding, max abs difference": 5e-4,
    "scores against logits, max abs difference": 5e-4,
    **{f"mode none against the base model: {name}": limit for name, limit in FEW.items()},
    "alpha 0 against mode none": 0,
    "promise R: rerun, max abs difference": 0,
    "a neighbour's text: max abs difference": 0,
    "caught: lora_B of the opposite sign": 0.5,
    "caught: A and B of another row": 0.5,
    "caught: B of another row": 0.5,
}
OF_A_MODE = {
    "factors, relative difference": 1e-4,
    **FEW,
    "update, relative difference": 0.05,
    "scores against logits, max abs difference": 5e-4,
    "scores against scores with the factors of adapt": 0,
}
RECORDED = [mode for mode in get_args(Mode) if mode != "static"]
OF_A_BUNDLE = {
    **{f"manifest: {name} that differ": 0 for name in ("fields of the model", "fields of the adaptation")},
    "manifest: counts of parameters that differ": 0,
    "manifest: digest of the checkpoint differs": 0,
    "centroids, max abs difference": 0,
    **{f"tokenizer: {name} that differ": 0 for name in ("entries of the vocabulary", "merges", "added tokens")},
    "tokenizer: other settings differ": 0,
    **{
        f"{name}: rows, largest relative difference": 0
        for name in ("token embedding", "head of decoder", "head of decoder_cpu")
    },
    "chooser: tokens that differ": 0,
    "logits_scorer: log-probabilities, max abs difference": 1e-4,
    "known answers: texts whose token ids differ": 0,
    "known answers: hidden states, relative difference": 1e-4,
    **{f"known answers: mode {mode}, log-probabilities, mean difference": 1e-4 for mode in RECORDED},
    **{f"known answers: mode {mode}, texts whose greedy tokens differ": 0 for mode in RECORDED},
    **{
        f"known answers: mode {mode}, greedy tokens that the reference does not choose": 0
        for mode in ("none", "cohort")
    },
    "embeddings, max abs difference": 1e-5,
    "cluster ids that differ": 0,
    "factors, relative difference": 1e-4,
    **{f"promise F: mode {mode}, factors alone and in a batch": 0 for mode in ("none", "centroid", "request")},
    **{f"mode {mode}: {name}": limit for mode in get_args(Mode) for name, limit in OF_A_MODE.items()},
    "texts whose token ids in a batch differ": 0,
    "texts whose first generated token differs from their token ids'": 0,
}


def test_a_right_bundle_passes_every_check(bundle: Path, mini: Checkpoint) -> None:
    checks, record = verify_bundle(bundle, mini, quiet, VerifyOptions(threads=1))
    assert [check for check in checks if not check.passed] == []
    found: dict[str, dict[str, float | None]] = {"decoder": {}, "decoder_cpu": {}}
    for check in checks:
        found[check.graph][check.name] = check.limit
    assert found["decoder"] == OF_A_GRAPH
    whole = OF_A_GRAPH | OF_A_BUNDLE
    whole.pop("mode none: update, relative difference")  # it is none
    assert found["decoder_cpu"] == whole
    assert len(checks) == sum(map(len, found.values())) == len(record["checks"])
    lower = {check.name for check in checks if check.at_least}
    assert lower == {name for name in OF_A_GRAPH if "top-1" in name or "caught" in name}


def test_a_right_bundle_of_trained_factors_passes(lora_bundle: Path, mini_lora: Checkpoint) -> None:
    assert missed(lora_bundle, mini_lora) == set()


def test_an_update_is_compared_over_all_logits() -> None:
    base, theirs = np.array([[[1.0, 2]], [[5.0, 5]]]), np.array([[[4.0, 6]], [[5.0, 5]]])  # the update is 3, 4, 0, 0

    def reference(ids: Any, logits: Any, row: int, positions: Any = ...) -> torch.Tensor:
        return torch.from_numpy(logits[row])

    def difference(ours: Any, without: Any = base) -> float | None:
        rows = [[1], [2]]
        return logit_checks.update_difference(reference, rows, list(ours), list(without), theirs, base)

    assert difference(theirs) == 0
    assert difference(theirs + 7, base + 7) == 0  # an error of both is none of the update
    assert difference(base) == 1
    assert difference(theirs + np.array([[[0, 0]], [[3.0, 4]]])) == 1
    assert difference(base + 2 * (theirs - base)) == 1
    assert difference(theirs + np.array([[[0, 0.5]], [[0, 0]]])) == pytest.approx(0.1)
    assert logit_checks.update_difference(reference, [[1]], [theirs[0]], [base[0]], base, base) is None


def test_tenants_share_clusters(runtime: Runtime, mini: Checkpoint) -> None:
    """Else mode tenant would be mode cohort."""
    rows = verification_rows(mini)[:8]
    arguments, _ = checkpoint_checks._arguments_of("tenant", runtime, mini, rows)
    found: dict[int, set[Any]] = {}
    clusters = runtime.adapt(rows, mode="none").cluster_ids.tolist()
    for cluster, tenant in zip(clusters, arguments["tenants"], strict=True):
        found.setdefault(cluster, set()).add(tenant)
    assert max(map(clusters.count, clusters)) > 1
    assert all(tenants == ({0, 1} if clusters.count(cluster) > 1 else {0}) for cluster, tenants in found.items())


def test_vectors_of_a_row_have_length_one_and_depend_on_the_row() -> None:
    takes: Any = SimpleNamespace(manifest=SimpleNamespace(adaptation=SimpleNamespace(conditioning_size=8)))
    none: Any = SimpleNamespace(manifest=SimpleNamespace(adaptation=SimpleNamespace(conditioning_size=0)))
    vectors = promises.given(takes, "request", [0, 3])["conditioning"]
    assert (vectors.shape, vectors.dtype) == ((2, 8), np.float32)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-6)
    assert promises.given(takes, "request", [3])["conditioning"].tolist() == vectors[1:].tolist()
    assert vectors[0].tolist() != vectors[1].tolist()
    assert promises.given(takes, "none", [0]) == promises.given(none, "request", [0]) == {}


def test_rows_are_ragged_and_reach_the_last_position(mini: Checkpoint) -> None:
    lengths = [len(ids) for ids in verification_rows(mini)]
    assert (len(lengths), min(lengths), max(lengths)) == (33, 1, 128)
    assert len(set(lengths)) > 20


def test_reduced_precisions_have_windows_of_one_kind_of_text(mini: Checkpoint) -> None:
    rows = verification_rows(mini, more=True)
    *_, longest = rows
    ragged, typical = checkpoint_checks.ragged_and_typical(rows)
    assert ragged == verification_rows(mini)
    assert {len(ids) for ids in rows[32:-1]} == {128}  # all positions of this model
    assert len(rows) == 33 + 24
    assert len(longest) == max(map(len, rows))
    assert typical == rows[32:40]
    assert checkpoint_checks.ragged_and_typical(ragged) == (ragged, ragged[:8])  # as in fp32


def swap_centroids(path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(path / "centroids.safetensors")
    save_file({"centroids": np.ascontiguousarray(tensors["centroids"][::-1])}, path / "centroids.safetensors")
    reseal(path)


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "a trunk weight off by a percent": (
        change_weights("transformer.h.1.mlp.c_fc.weight", lambda w: w * 1.05),
        "x1 factors: logits",
    ),
    "a layer norm forgotten": (change_weights("transformer.h.0.ln_1.weight", lambda w: w * 0 + 1.1), "mode none"),
    "alpha folded in twice": (change_weights("lm_head.lora_B.bias", lambda b: b * 2), "factors, relative"),
    "lora_B not reordered": (
        change_weights("lm_head.lora_B.weight", lambda w: w.reshape(4, 512, -1).swapaxes(0, 1).reshape(w.shape)),
        "factors, relative",
    ),
    "centroids in another order": (swap_centroids, "cluster ids"),
    "wrong count of parameters": (edit(parameters__base=1), "manifest: counts of parameters"),
    "positions shifted": (
        change_weights("transformer.wpe.weight", lambda w: np.roll(w * 5, 1, axis=0)),
        "x1 factors: logits",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_bundle_is_caught(name: str, bundle: Path, mini: Checkpoint, copy_of: Callable[[Path], Path]) -> None:
    damage, expected = WRONG[name]
    path = copy_of(bundle)
    damage(path)
    assert any(check.startswith(expected) for check in missed(path, mini))


def test_decoders_that_mix_rows_or_forget_are_caught(
    portable: Runtime, runtime: Runtime, mini: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Faults of a runtime rather than of a bundle."""
    rows, gate = verification_rows(mini), GATES["fp32"]
    long_rows = [ids for ids in rows if len(ids) >= 16][:4]
    decoder: Any = portable.decoder
    run = decoder._run

    def leaky(*arguments: Any) -> Any:
        logits = run(*arguments)
        return logits + 1e-3 * logits.mean(axis=0, keepdims=True) * (len(logits) > 1)

    def forgetful(ids: Any, mask: Any, positions: Any, adaptation: Any, cache: Any) -> Any:
        logits = run(ids, mask, positions, adaptation, cache)
        cache.lengths = cache.lengths - (mask.shape[1] > 1)
        return logits

    monkeypatch.setattr(decoder, "_run", leaky)
    assert not all(check.passed for check in promises.check_batching(portable, rows, gate))
    monkeypatch.setattr(decoder, "_run", forgetful)
    assert not all(check.passed for check in checkpoint_checks.check_cache(portable, RowLogits(mini), long_rows, gate))

    damage_cache(runtime, CACHE_FAULTS[0], monkeypatch)
    assert not all(check.passed for check in checkpoint_checks.check_cache(runtime, RowLogits(mini), long_rows, gate))


@pytest.mark.parametrize("option", ["padding", "truncation", "dropout"])
def test_a_bundle_whose_tokenizer_changes_token_ids_is_not_verified(
    option: str, bundle: Path, mini: Checkpoint
) -> None:
    """`load` refuses such a bundle; `verify` notices by itself."""
    runtime, rows = chameleon_deploy.load(bundle, threads=1), verification_rows(mini)[:8]
    assert all(check.passed for check in check_texts(runtime, mini.trunk.tokenizer, rows))
    match option:
        case "padding":
            runtime.tokenizer.enable_padding(pad_id=0)
        case "truncation":
            runtime.tokenizer.enable_truncation(8)
        case "dropout":
            runtime.tokenizer.model.dropout = 0.5
    ids, _ = check_texts(runtime, mini.trunk.tokenizer, rows)
    assert not ids.passed


def test_a_decoder_that_ignores_its_factors_is_caught(
    portable: Runtime, mini: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, reference = verification_rows(mini)[:8], RowLogits(mini)
    checks = list(wrong_factors.check_wrong_factors(portable, reference, rows))
    assert len(checks) == 3
    assert all(check.passed and check.value > 0.9 for check in checks)
    decoder: Any = portable.decoder
    run, none = decoder._run, portable.adapt(rows[:1], mode="none").factors

    def deaf(ids: Any, mask: Any, positions: Any, factors: Any, cache: Any) -> Any:
        return run(ids, mask, positions, none.rows(np.zeros(len(ids), np.int64)), cache)

    monkeypatch.setattr(decoder, "_run", deaf)
    assert not any(check.passed for check in wrong_factors.check_wrong_factors(portable, reference, rows))


def test_a_check_that_cannot_be_made_says_so(
    bundle: Path, lora_bundle: Path, mini: Checkpoint, mini_lora: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = verification_rows(mini)[:8]
    silent = dataclasses.replace(mini, factors=copy.deepcopy(mini.factors))
    for parameter in silent.factors.parameters():
        parameter.data.zero_()
    runtime = chameleon_deploy.load(bundle, threads=1)
    zeros = head_factors(np.zeros((4, 64), np.float32), np.zeros((4, 512), np.float32))
    sets = check_factors(zeros, runtime.manifest.adaptation)
    monkeypatch.setattr(runtime.backend, "generate_factors", lambda c: sets[np.zeros(len(c), np.int64)])
    notes = [check.note for check in wrong_factors.check_wrong_factors(runtime, RowLogits(silent), rows)]
    assert len(notes) == 3
    assert all(note.startswith("not checked: it changes no logit") for note in notes)

    one_set = chameleon_deploy.load(lora_bundle, threads=1)
    first, *others = wrong_factors.check_wrong_factors(one_set, RowLogits(mini_lora), rows)
    assert first.passed
    assert first.limit is not None
    assert [check.note for check in others] == ["not checked: mode static has one factor set"] * 2


def test_a_larger_kl_is_accepted_and_never_a_smaller() -> None:
    gate = GATES["int8"]
    assert accept(gate, 1e-4) == gate
    relaxed = accept(gate, 4 * gate.kl_mean)
    assert relaxed.kl_mean == 4 * gate.kl_mean
    assert relaxed.kl_p999 == 4 * gate.kl_p999
    assert relaxed.top1_agreement == pytest.approx(0.88)


def test_export_records_the_kl_that_it_was_told_to_accept(mini_path: Path, tmp_path: Path) -> None:
    done = call("chameleon_deploy.export", mini_path, "--out", tmp_path / "b", "--max-kl", 0.25)
    assert done.returncode == 0, done.stderr
    assert open_bundle(tmp_path / "b").manifest.parity.accepted_kl == 0.25
    assert json.loads((tmp_path / "b/parity.json").read_text())["accepted_kl"] == 0.25
    assert "accepting a mean KL of 0.25" in call("chameleon_deploy.inspect", tmp_path / "b").stdout
    refused = call("chameleon_deploy.export", mini_path, "--out", tmp_path / "c", "--max-kl", 0.25, "--no-verify")
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)


def test_logits_are_compared_relative_to_their_scale() -> None:
    """A strong update makes logits of hundreds; the rounding errors of a right model grow with them."""
    expected = torch.randn(64, 500, generator=torch.Generator().manual_seed(0))
    scales = []
    for factor in (1.0, 400.0):
        figures = LogitFigures()
        figures.add(expected * factor * (1 + 1e-6), expected * factor, torch.empty(0, dtype=torch.int64))
        scales.append((figures.scale, figures.max_abs / figures.scale))
    assert scales[0][0] == 1
    assert scales[1][0] == pytest.approx(100, rel=0.02)
    assert scales[1][1] < 5e-5
    assert logit_scale([expected.numpy() * 400]) == pytest.approx(scales[1][0])


def test_nan_passes_no_check() -> None:
    assert not Check("x", float("nan"), 1.0).passed
    assert not Check("x", float("nan"), 1.0, at_least=True).passed
    assert not Check("x", float("nan"), None).passed
    assert not Check("x", float("inf"), 1.0, at_least=True).passed
    assert Check("x", 5.0, None).passed


@pytest.mark.parametrize("position", range(3))
def test_the_largest_of_values_keeps_nan(position: int) -> None:
    values = [1.0, 2.0]
    values.insert(position, float("nan"))
    assert math.isnan(largest(values))
    assert (largest([]), largest([0.5, 2.0, 1.0])) == (0.0, 2.0)


@pytest.mark.parametrize("sizes", [{3}, {4}, {32}, {3, 4, 32}])
@pytest.mark.parametrize("row", [1, 2, -1])
def test_nan_in_a_row_of_a_batch_is_caught(
    sizes: set[int], row: int, runtime: Runtime, mini: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    all_logits = runtime.decoder.all_logits

    def damaged(rows: Any, factors: Any) -> Any:
        for start, piece in all_logits(rows, factors):
            logits = np.array(piece)
            if len(rows) in sizes:
                logits[row] = np.nan
            yield start, logits

    monkeypatch.setattr(runtime.decoder, "all_logits", damaged)
    batching, *_ = promises.check_batching(runtime, verification_rows(mini), GATES["fp32"])
    assert math.isnan(batching.value)
    assert not batching.passed


@pytest.mark.parametrize("precision", GATES)
def test_nan_in_one_mode_is_caught(
    precision: Precision, runtime: Runtime, mini: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    all_logits = runtime.decoder.all_logits

    def damaged(rows: Any, factors: Any) -> Any:
        for start, piece in all_logits(rows, factors):
            logits = np.array(piece)
            if not np.asarray(factors.sets.tensors["lm_head.lora_B"]).any():
                logits[1:] = np.nan
            yield start, logits

    monkeypatch.setattr(runtime.decoder, "all_logits", damaged)
    rows = verification_rows(mini)[:8]
    *against_base, _ = checkpoint_checks.check_base(runtime, RowLogits(mini), rows, GATES[precision])
    assert against_base
    assert not any(check.passed for check in against_base)


def test_figures_keep_nan() -> None:
    figures = LogitFigures()
    actual = torch.zeros(3, 4)
    actual[1, 2] = float("nan")
    for rows in (slice(0, 2), slice(2, 3)):
        figures.add(actual[rows], torch.zeros(3, 4)[rows], torch.empty(0, dtype=torch.int64))
    assert math.isnan(figures.max_abs)
    assert math.isnan(float(torch.cat(figures.kl).mean()))


def test_kl_and_top1_are_computed_right() -> None:
    figures = LogitFigures()
    expected = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.05, 0.0]])
    actual = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    figures.add(actual, expected, torch.tensor([2]))
    p, q = expected[0].softmax(0), actual[0].softmax(0)
    assert figures.kl[0][0].item() == pytest.approx(float((p * (p / q).log()).sum()), abs=1e-6)
    assert (figures.top1(0.1), figures.max_abs) == ((1, 0), 2.0)
    assert figures.nll[0] == pytest.approx(-float(q[2].log()), abs=1e-6)


def test_the_command_exits_1_on_a_missed_gate(
    bundle: Path, mini_path: Path, copy_of: Callable[[Path], Path], tmp_path: Path
) -> None:
    good = call("chameleon_deploy.verify", bundle, "--reference", mini_path, "--json")
    assert good.returncode == 0, good.stderr
    assert json.loads(good.stdout)["verified"] is True
    wrong = copy_of(bundle)
    change_weights("lm_head.lora_B.bias", lambda b: b * 2)(wrong)
    bad = call("chameleon_deploy.verify", wrong, "--reference", mini_path, "--out", tmp_path / "record.json")
    assert bad.returncode == 1
    assert "MISSED" in bad.stdout
    assert "factors, relative difference" in bad.stderr
    assert json.loads((tmp_path / "record.json").read_text())["verified"] is False


def test_a_missed_gate_fails_the_export(mini_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GATES, "fp32", replace(GATES["fp32"], kl_mean=-1.0))
    result = call("chameleon_deploy.export", mini_path, "--out", tmp_path / "out")
    assert result.returncode == 1
    assert "KL, mean" in result.stderr
    assert not list(tmp_path.iterdir())

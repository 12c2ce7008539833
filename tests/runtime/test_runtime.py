"""The runtime against the PyTorch reference: every mode, every batch size, every length."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import chameleon_deploy
from chameleon_deploy import Runtime, Sampling
from chameleon_deploy.contract.bundle import Mode, factor_names
from chameleon_deploy.errors import (
    ChameleonError,
    FactorsError,
    InputError,
    LengthError,
    ModeError,
    NumericError,
    TokenError,
)
from chameleon_deploy.reference import inference
from chameleon_deploy.reference.checkpoint import Checkpoint
from chameleon_deploy.runtime.adaptation import assign, conditioning
from chameleon_deploy.runtime.decode import growing_cache, shared_cache, tiled_scorer
from chameleon_deploy.runtime.decode.decoder import parts
from tests.logits import row_logits
from tests.rows import head_factors, random_rows

MODES: tuple[Mode, ...] = ("none", "centroid", "request", "cohort", "tenant")


def reference_logprobs(checkpoint: Checkpoint, rows: list[list[int]], mode: str, tenants: Any = None) -> list[Any]:
    adaptation = inference.adapt(checkpoint, rows, mode, tenants)
    return [
        row_logits(checkpoint, ids, adaptation, row)
        .log_softmax(-1)[:-1]
        .gather(1, torch.tensor(ids[1:], dtype=torch.int64)[:, None])[:, 0]
        .numpy()
        for row, ids in enumerate(rows)
    ]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("batch", "longest"), [(1, 1), (1, 128), (2, 5), (3, 40), (8, 128), (32, 60)])
def test_scores_equal_the_reference(runtime: Runtime, mini: Checkpoint, mode: Any, batch: int, longest: int) -> None:
    rows = random_rows(batch * 1000 + longest, batch, longest)
    if longest == 128:
        rows[0] = (rows[0] * 128)[:128]  # the model's maximum
    tenants = [f"tenant {i % 3}" for i in range(batch)] if mode == "tenant" else None
    scores = runtime.score(rows, mode=mode, tenants=tenants)
    for ids, score, expected in zip(rows, scores, reference_logprobs(mini, rows, mode, tenants), strict=True):
        assert score.token_ids == ids
        assert len(score.token_logprobs) == len(ids) - 1
        np.testing.assert_allclose(score.token_logprobs, expected, atol=5e-4)


@pytest.mark.parametrize("mode", MODES)
def test_greedy_tokens_equal_the_reference(runtime: Runtime, mini: Checkpoint, mode: Any) -> None:
    rows = random_rows(7, 12, 60)
    tenants = [i % 2 for i in range(12)] if mode == "tenant" else None
    generations = runtime.generate(rows, max_new_tokens=16, mode=mode, tenants=tenants)
    adaptation = inference.adapt(mini, rows, mode, tenants)
    for row, ids in enumerate(rows):
        produced = list(ids)
        for token in generations[row].token_ids:
            logits = row_logits(mini, produced, adaptation, row)[-1]
            best, second = logits.topk(2).values.tolist()
            if best - second <= 1e-3:
                break  # too close to call: from here on the two texts may part
            assert token == int(logits.argmax())
            produced.append(token)


def test_lora_bundle_equals_the_reference(lora_runtime: Runtime, mini_lora: Checkpoint) -> None:
    rows = random_rows(3, 6, 50)
    assert lora_runtime.mode == "static"
    scores, base = lora_runtime.score(rows), lora_runtime.score(rows, mode="none")
    for score, expected in zip(scores, reference_logprobs(mini_lora, rows, "static"), strict=True):
        np.testing.assert_allclose(score.token_logprobs, expected, atol=5e-4)
    assert max(abs(a.logprob - b.logprob) for a, b in zip(scores, base, strict=True)) > 0.01


def test_callers_factors_are_used(runtime: Runtime, mini: Checkpoint) -> None:
    rng = np.random.default_rng(0)
    lora_A, lora_B = (rng.normal(size=(7, n)).astype(np.float32) * 0.2 for n in (64, 512))
    ids = random_rows(5, 1, 30)[0] + [1, 2]
    score = runtime.score([ids], mode="static", factors=head_factors(lora_A, lora_B))[0]
    hidden, _ = mini.trunk.hidden_states(torch.tensor([ids]))
    logits = hidden[0] @ mini.trunk.head_weight.T + hidden[0] @ torch.from_numpy(lora_A.T @ lora_B)
    expected = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    np.testing.assert_allclose(score.token_logprobs, expected.numpy(), atol=5e-4)


@given(seed=st.integers(0, 10_000), batch=st.integers(1, 20))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_clusters_and_groups_follow_design(runtime: Runtime, mini: Checkpoint, seed: int, batch: int) -> None:
    rows = random_rows(seed, batch, 20)
    tenants = [int(t) for t in np.random.default_rng(seed).integers(0, 3, batch)]
    for mode in ("cohort", "tenant"):
        given_tenants = tenants if mode == "tenant" else None
        ours = runtime.adapt(rows, mode=mode, tenants=given_tenants)
        theirs = inference.adapt(mini, rows, mode, given_tenants)
        assert ours.cluster_ids.tolist() == theirs.cluster_ids.tolist()
        lora_A, lora_B = (np.asarray(ours.factors.sets.tensors[name]) for name in factor_names("lm_head"))
        assert ours.factors.factor_ids.tolist() == theirs.factor_ids.tolist()
        their_A, their_B = (theirs.factors[name] for name in factor_names("lm_head"))
        assert lora_A.shape == their_A.shape
        np.testing.assert_allclose(lora_A, their_A, atol=1e-5)
        np.testing.assert_allclose(lora_B, their_B.swapaxes(1, 2), atol=1e-5)


def test_conditioning_is_the_mean_and_is_not_normalised_again() -> None:
    embeddings = np.array([[1, 0], [0, 1], [0, 1]], np.float32)
    vectors, ids = conditioning(embeddings, np.array([4, 2, 4]), tenants=None)
    assert ids.tolist() == [0, 1, 0]
    np.testing.assert_array_equal(vectors, [[0.5, 0.5], [0, 1]])


def test_ties_go_to_the_lowest_cluster() -> None:
    centroids = np.array([[0, 1], [1, 0], [1, 0]], np.float32)
    assert assign(np.array([[1, 0]], np.float32), centroids).tolist() == [1]
    assert assign(np.array([[1, 0]], np.float32), np.empty((0, 2), np.float32)).tolist() == [-1]


@pytest.mark.parametrize("mode", ["none", "centroid", "request", "tenant"])
def test_factors_do_not_depend_on_neighbours(runtime: Runtime, mode: Any) -> None:
    """Promise F, to the last bit; within the tenant for mode tenant."""
    rows = random_rows(11, 9, 40)
    tenants = list(range(9)) if mode == "tenant" else None
    together = runtime.adapt(rows, mode=mode, tenants=tenants).factors
    for row, ids in enumerate(rows):
        alone = runtime.adapt([ids], mode=mode, tenants=[0] if tenants else None).factors
        own = together.sets[together.factor_ids[[row]]].tensors
        assert all(np.array_equal(array, own[name]) for name, array in alone.sets.tensors.items())


def test_cohort_does_depend_on_neighbours(runtime: Runtime) -> None:
    """What the documentation warns of is so: the paper's mode mixes callers."""
    rows = random_rows(12, 16, 40)
    together = runtime.adapt(rows, mode="cohort").factors
    crowded = int(np.argmax(np.bincount(together.factor_ids)[together.factor_ids]))
    alone = runtime.adapt([rows[crowded]], mode="cohort").factors
    own = together.sets[together.factor_ids[[crowded]]]
    assert not np.array_equal(alone.sets.tensors["lm_head.lora_B"], own.tensors["lm_head.lora_B"])


def test_long_batches_are_read_in_pieces(portable: Runtime, runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = random_rows(13, 5, 100)
    whole, generated = runtime.score(rows), runtime.generate(rows, max_new_tokens=5)
    monkeypatch.setattr(growing_cache, "PIECE_BYTES", 5 * 4 * 512 * 7)  # seven columns of logits
    monkeypatch.setattr(runtime.decoder, "prefill_tokens", 150)  # one or two rows
    monkeypatch.setattr(shared_cache, "SCORED_TOKENS", 9)
    monkeypatch.setattr(tiled_scorer, "POSITIONS", 7)
    longest = max(rows, key=len)
    pieces = list(runtime.decoder.all_logits([longest], runtime.adapt([longest]).factors))
    assert [start for start, _ in pieces] == list(range(0, len(longest), 9))
    assert len(list(portable.decoder.all_logits(rows, portable.adapt(rows).factors))) > 10
    assert len(list(parts(np.array([len(ids) for ids in rows]), 150))) > 2
    for engine in (portable, runtime):
        for a, b in zip(whole, engine.score(rows), strict=True):
            np.testing.assert_allclose(a.token_logprobs, b.token_logprobs, atol=1e-5)
        alone = engine.score([longest], mode="none")[0].token_logprobs
        np.testing.assert_allclose(alone, portable.score([longest, [1]], mode="none")[0].token_logprobs, atol=1e-5)
        again = engine.generate(rows, max_new_tokens=5)
        assert [g.token_ids for g in generated] == [g.token_ids for g in again]


@given(seed=st.integers(0, 10_000), batch=st.integers(1, 12))
@settings(max_examples=30, deadline=None)
def test_both_decoder_graphs_say_the_same(portable: Runtime, runtime: Runtime, seed: int, batch: int) -> None:
    rows = random_rows(seed, batch, 60)
    limits = [1 + (seed + 3 * i) % 9 for i in range(batch)]
    assert (portable.graph, runtime.graph) == ("decoder", "decoder_cpu")
    for a, b in zip(portable.score(rows), runtime.score(rows), strict=True):
        np.testing.assert_allclose(a.token_logprobs, b.token_logprobs, atol=1e-5)
    generated = [r.generate(rows, max_new_tokens=limits) for r in (portable, runtime)]
    assert generated[0] == generated[1]


def test_parts_cover_the_rows_in_order() -> None:
    lengths = np.array([3, 3, 4, 12, 1, 9, 2])
    assert [(p.start, p.stop) for p in parts(lengths, 10)] == [(0, 2), (2, 3), (3, 4), (4, 5), (5, 6), (6, 7)]
    assert [(p.start, p.stop) for p in parts(lengths, 100, max_rows=3)] == [(0, 3), (3, 6), (6, 7)]


def test_texts_and_their_ids_are_the_same(runtime: Runtime) -> None:
    texts = ["The river runs.", "def f(x):"]
    ids = [runtime.tokenizer.encode(text).ids for text in texts]
    assert runtime.score(texts) == runtime.score(ids) == runtime.score([np.array(i) for i in ids])


def test_one_runtime_many_threads(runtime: Runtime) -> None:
    batches = [random_rows(seed, 3, 30) for seed in range(8)]
    sampling = Sampling(temperature=1.0, seed=4)
    serial = [
        runtime.generate(rows, max_new_tokens=6, sampling=sampling, mode=MODES[i % 4]) for i, rows in enumerate(batches)
    ]
    results: list[Any] = [None] * 64

    def work(i: int) -> None:
        results[i] = runtime.generate(batches[i % 8], max_new_tokens=6, sampling=sampling, mode=MODES[i % 8 % 4])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(results[i] == serial[i % 8] for i in range(64))


def test_centroid_factors_are_computed_once(bundle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = chameleon_deploy.load(bundle, mode="centroid", threads=1)
    calls: list[int] = []
    generate = runtime.backend.generate_factors

    def counted(conditioning: Any) -> Any:
        calls.append(len(conditioning))
        return generate(conditioning)

    monkeypatch.setattr(runtime.backend, "generate_factors", counted)
    for seed in range(3):
        runtime.adapt(random_rows(seed, 4, 10))
    assert not calls  # loading in this mode has done it


@pytest.mark.parametrize(
    ("texts", "error", "message"),
    [
        ([], InputError, "batch is empty"),
        ("text", InputError, "single str"),
        ([""], InputError, "text 0 is empty"),
        (["a", [1]], InputError, "mixes"),
        ([[1], []], InputError, "text 1 is empty"),
        ([[1.5]], InputError, "text 0 is neither"),
        ([["a"]], InputError, "text 0 is neither"),
        (["fine", "a\ud800b"], InputError, "text 1 holds a lone surrogate"),
        ([[512]], TokenError, "token id 512 is outside the vocabulary of 512"),
        ([[3, -1]], TokenError, "token id -1"),
        ([[1] * 129], LengthError, "129 tokens, the model has 128 positions"),
        (["word " * 400], LengthError, "positions"),
    ],
)
def test_bad_texts(runtime: Runtime, texts: Any, error: type[ChameleonError], message: str) -> None:
    for method in (runtime.adapt, runtime.score, runtime.generate, runtime.stream):
        with pytest.raises(error, match=message):
            method(texts)


A, B = factor_names("lm_head")
GOOD = head_factors(np.zeros((2, 64), np.float32), np.zeros((2, 512), np.float32))


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        ({**GOOD, A: GOOD[A][:, :-1]}, r"lm_head.lora_A has shape \(2, 63\), expected \(rank, 64\)"),
        ({**GOOD, B: GOOD[B].T}, "lm_head.lora_B has shape"),
        ({**GOOD, A: GOOD[A][:1]}, "lm_head.lora_A has rank 1; lm_head.lora_B has rank 2: use one"),
        ({A: GOOD[A][:0], B: GOOD[B][:0]}, "lm_head.lora_A has shape"),
        ({**GOOD, A: GOOD[A].astype(np.float64)}, "lm_head.lora_A has dtype float64"),
        ({**GOOD, B: GOOD[B] + np.float32("nan")}, "lm_head.lora_B holds NaN"),
        ({**GOOD, A: GOOD[A] + np.float32("inf")}, "lm_head.lora_A holds NaN or infinity"),
        ({A: GOOD[A]}, r"factors hold \['lm_head.lora_A'\]: pass a dict with the arrays lm_head.lora_A, lm_"),
        ({**GOOD, "lora_A": GOOD[A]}, "'lora_A'"),
        ((GOOD[A], GOOD[B]), "factors hold a tuple: pass a dict"),
        (3, "factors hold a int"),
    ],
)
def test_bad_factors(runtime: Runtime, factors: Any, message: str) -> None:
    with pytest.raises(FactorsError, match=message):
        runtime.score([[1, 2]], mode="static", factors=factors)


def test_factors_that_overflow_are_an_error(runtime: Runtime) -> None:
    huge = head_factors(np.full((2, 64), 1e30, np.float32), np.full((2, 512), 1e30, np.float32))
    with pytest.raises(NumericError, match="check the factors"):
        runtime.score([[1, 2, 3]], mode="static", factors=huge)
    with pytest.raises(NumericError, match="check the factors"):
        runtime.generate([[1, 2, 3]], mode="static", factors=huge)


def _call(runtime: Runtime, **arguments: Any) -> Any:
    return runtime.adapt([[1, 2], [3]], **arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"mode": "magic"}, ModeError, "'magic' is not a mode"),
        ({"mode": "static"}, ModeError, "needs factors"),
        ({"mode": "cohort", "factors": GOOD}, ModeError, "pass mode='static'"),
        ({"mode": "tenant"}, InputError, "needs one tenant per text"),
        ({"mode": "cohort", "tenants": [1, 2]}, InputError, "other modes take none"),
        ({"mode": "tenant", "tenants": [1]}, InputError, "1 tenants for 2 texts"),
    ],
)
def test_bad_modes(runtime: Runtime, arguments: Any, error: type[ChameleonError], message: str) -> None:
    with pytest.raises(error, match=message):
        _call(runtime, **arguments)


@pytest.mark.parametrize("mode", ["centroid", "request", "cohort", "tenant"])
def test_a_lora_bundle_has_no_hypernetwork(lora_runtime: Runtime, lora_bundle: Any, mode: Any) -> None:
    with pytest.raises(ModeError, match="choose one of none, static"):
        lora_runtime.adapt([[1]], mode=mode, tenants=[1] if mode == "tenant" else None)
    with pytest.raises(ModeError, match="choose one of none, static"):
        chameleon_deploy.load(lora_bundle, mode=mode)


@pytest.mark.parametrize(
    ("installed", "message"),
    [([], "not installed"), (["onnxruntime", "onnxruntime-gpu"], "overwrite each other: pip uninstall")],
)
def test_onnxruntime_wheels(
    bundle: Any, monkeypatch: pytest.MonkeyPatch, installed: Sequence[str], message: str
) -> None:
    from chameleon_deploy.errors import DependencyError
    from chameleon_deploy.runtime.decode import session

    monkeypatch.setattr(session, "_is_installed", lambda name: name in installed)
    with pytest.raises(DependencyError, match=message):
        chameleon_deploy.load(bundle)


def test_a_runtime_is_freed_with_its_last_reference(bundle: Path) -> None:
    """Its sessions hold the weights: a cycle of references would keep them until Python's collector runs."""
    runtime = chameleon_deploy.load(bundle, threads=1)
    runtime.generate([[1, 2]], max_new_tokens=2)
    freed = weakref.ref(runtime)
    gc.disable()
    try:
        del runtime
        assert freed() is None
    finally:
        gc.enable()

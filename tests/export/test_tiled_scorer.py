"""Scores by tiles of the vocabulary: the log-softmax of the decoder's logits, and nothing stored that need not be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import chameleon_deploy
from chameleon_deploy import Runtime
from chameleon_deploy.export import tiled_scorer
from chameleon_deploy.export.exporter import export_bundle
from chameleon_deploy.reference.checkpoint import Checkpoint
from chameleon_deploy.runtime.decode.session import open_session
from tests.damage import reseal
from tests.verification import missed

TILE = 100  # of a vocabulary of 512: six tiles, the last of them of 12 tokens
CASES = [("mini", "fp32"), ("llama", "fp32"), ("mini", "int8")]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def tiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runtime:
    checkpoint, precision = request.getfixturevalue(request.param[0]), request.param[1]
    return chameleon_deploy.load(_export(checkpoint, precision, tmp_path_factory.mktemp("tiled")), threads=1)


def _export(checkpoint: Checkpoint, precision: Any, directory: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiled_scorer, "TILE", TILE)
        export_bundle(checkpoint, directory / "bundle", precision=precision)
    return directory / "bundle"


def _expected(runtime: Runtime, rows: list[list[int]]) -> list[Any]:
    """log softmax of the decoder's own logits, one row at a time."""
    factors, expected = runtime.adapt(rows).factors, []
    for row, ids in enumerate(rows):
        (_, logits), *_ = runtime.decoder.all_logits([ids], factors.rows(np.array([row])))
        z = np.asarray(logits)[0, :-1].astype(np.float64)
        expected.append(z[np.arange(len(ids) - 1), ids[1:]] - np.log(np.exp(z).sum(1)))
    return expected


@given(seed=st.integers(0, 10_000), batch=st.integers(1, 9))
@settings(max_examples=15, deadline=None)
def test_scores_are_what_the_logits_say(tiled: Runtime, seed: int, batch: int) -> None:
    rng = np.random.default_rng(seed)
    edges = [0, TILE - 1, TILE, 5 * TILE - 1, 5 * TILE, 511]  # the first and last tokens of tiles are targets too
    rows = [[*rng.integers(0, 512, n).tolist(), *edges] for n in rng.integers(1, 60, batch)]
    for score, expected in zip(tiled.score(rows), _expected(tiled, rows), strict=True):
        # In int8 the batch's last bits decide how a value is rounded.
        tolerance = 0.02 if tiled.manifest.precision == "int8" else 2e-5
        np.testing.assert_allclose(score.token_logprobs, expected, atol=tolerance)


@pytest.mark.parametrize("tiled", CASES[:2], indirect=True, ids="-".join)
def test_the_graph_alone(tiled: Runtime) -> None:
    """Against numpy, with factors as large as the logits and a target in every tile."""
    bundle = tiled.bundle
    session = open_session(bundle, bundle.manifest.graphs["hidden_scorer"], 1)
    decoder = ir.load(bundle.path / "decoder.onnx").graph.initializers
    head = decoder["lm_head.weight"].const_value.numpy().astype(np.float64)  # type: ignore[union-attr]
    rng = np.random.default_rng(0)
    hidden_states = rng.standard_normal((90, 64)).astype(np.float32)
    lora_A, lora_B = (rng.standard_normal((3, 2, n)).astype(np.float32) for n in (64, 512))
    targets, factor_ids = rng.permutation(512)[:90], rng.integers(0, 3, 90)
    (found,) = session.run(None, {"hidden_states": hidden_states, "targets": targets, "factor_ids": factor_ids,
                                  "lm_head.lora_A": lora_A, "lm_head.lora_B": lora_B})  # fmt: skip
    h = hidden_states.astype(np.float64)
    products = np.einsum("nh,nrh->nr", h, lora_A[factor_ids])
    logits = h @ head.T + np.einsum("nr,nrv->nv", products, lora_B[factor_ids])
    highest = logits.max(1)
    sums = np.log(np.exp(logits - highest[:, None]).sum(1))
    np.testing.assert_allclose(found, logits[np.arange(90), targets] - highest - sums, rtol=1e-5, atol=1e-4)


def test_what_the_tiles_take(tiled: Runtime) -> None:
    """Rows of the matrix that is stored already."""
    path, int8 = tiled.bundle.path, tiled.manifest.precision == "int8"
    decoder, scorer = (ir.load(path / f"{name}.onnx").graph for name in ("decoder_cpu", "hidden_scorer"))
    name = "lm_head.weight.int8" if int8 else "lm_head.weight"
    whole: Any = decoder.initializers[name].const_value
    tiles: Any = [scorer.initializers[f"{name}.{start}"].const_value for start in range(0, 512, TILE)]
    assert [tile.shape[0] for tile in tiles] == [100, 100, 100, 100, 100, 12]
    np.testing.assert_array_equal(np.concatenate([tile.numpy() for tile in tiles]), whole.numpy())
    assert all(whole.offset <= tile.offset < whole.offset + whole.nbytes for tile in tiles)
    stored = {value.const_value.name for value in scorer.initializers.values()
              if isinstance(value.const_value, ir.ExternalTensor)}  # fmt: skip
    assert len(stored) == len(tiles) * (2 if int8 else 1)  # and the scales


def test_verify_catches_a_wrong_tile(mini: Checkpoint, tmp_path: Path, copy_of: Callable[[Path], Path]) -> None:
    path = copy_of(_export(mini, "fp32", tmp_path))
    assert missed(path, mini) == set()
    scorer = ir.load(path / "hidden_scorer.onnx")
    second, third = (scorer.graph.initializers[f"lm_head.weight.{start}"] for start in (TILE, 2 * TILE))
    second.const_value, third.const_value = third.const_value, second.const_value
    for value in (second, third):
        value.const_value.name = value.name  # type: ignore[union-attr]
    ir.save(scorer, path / "hidden_scorer.onnx")
    reseal(path)
    assert "scores against logits, max abs difference" in missed(path, mini)

"""Bundles of the Llama family: the gates of GPT-2, and the faults that the gates must catch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from chameleon_deploy.contract.bundle import open_bundle
from chameleon_deploy.export import attention, trunk
from chameleon_deploy.export.exporter import export_bundle
from chameleon_deploy.reference import inference
from chameleon_deploy.reference.checkpoint import Checkpoint
from chameleon_deploy.reference.inference import RowLogits
from chameleon_deploy.reference.random import base_config
from chameleon_deploy.runtime import load
from chameleon_deploy.verify.checkpoint_checks import check_logits
from chameleon_deploy.verify.gates import GATES
from chameleon_deploy.verify.run import VerifyOptions, verify_bundle
from tests.conftest import checkpoint_around
from tests.devices import on_cpu
from tests.logits import row_logits

ROWS = [[7, 300, 41, 9, 250, 77, 8], [5, 9, 200, 3], list(range(1, 128))]


def quiet(what: str, done: int, total: int) -> None:
    pass


def test_every_gate_holds_on_every_graph(llama_bundle: Path, llama: Checkpoint) -> None:
    checks, record = verify_bundle(llama_bundle, llama, quiet, VerifyOptions(threads=1))
    assert record["verified"], [check for check in checks if not check.passed]
    assert {check.graph for check in checks} == {"decoder", "decoder_cpu"}


@pytest.mark.parametrize(
    "changes",
    [
        {"tie_word_embeddings": True},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1, "head_dim": 32},
        {"rope": {"rope_type": "linear", "factor": 4.0}},
        {"rope": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}},
        {"rope": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                  "original_max_position_embeddings": 32}},
    ],
    ids=lambda changes: str(next(iter(changes.values()))).replace("'", ""),
)  # fmt: skip
def test_variants(changes: dict[str, Any], tmp_path: Path) -> None:
    """Scores over the whole length and token by token, on both graphs, against the reference."""
    config = base_config("llama-mini")
    if rope := changes.pop("rope", None):
        config.rope_parameters = {"rope_theta": 10000.0} | rope
    config.update(changes)
    checkpoint = checkpoint_around(config)
    assert checkpoint.trunk.is_tied == config.tie_word_embeddings
    export_bundle(checkpoint, tmp_path / "bundle")
    theirs = inference.adapt(checkpoint, ROWS, "cohort")
    for graph in ("decoder", "decoder_cpu"):
        runtime = on_cpu(open_bundle(tmp_path / "bundle"), graph)
        for row, score in enumerate(runtime.score(ROWS)):
            logits = row_logits(checkpoint, ROWS[row], theirs, row)
            expected = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(ROWS[row][1:])[:, None])[:, 0]
            np.testing.assert_allclose(score.token_logprobs, expected, atol=5e-4)
        written = runtime.generate(ROWS[:2], max_new_tokens=20)
        for row, generation in enumerate(written):
            assert generation.token_ids == greedy(checkpoint, ROWS[row], row, len(generation.token_ids))


def greedy(checkpoint: Checkpoint, prompt: list[int], row: int, steps: int) -> list[int]:
    """The reference's own continuation, recomputed from the start for every token."""
    adaptation = inference.adapt(checkpoint, ROWS[:2], "cohort")
    ids = list(prompt)
    for _ in range(steps):
        ids.append(int(row_logits(checkpoint, ids, adaptation, row)[-1].argmax()))
    return ids[len(prompt) :]


def _without_rotation(op: Any, x: Any, rotary_dim: int, dim: int, cos: Any, sin: Any) -> Any:
    return op.Mul(x, op.Constant(value_float=1.0))


def _interleaved(op: Any, x: Any, times: int, heads: int, dim: int) -> Any:
    """Key-value heads in the order 0 1 0 1 instead of 0 0 1 1."""
    return op.Reshape(op.Expand(op.Unsqueeze(x, [1]), [1, times, 1, 1, 1]), [0, heads, -1, dim])


def _one_late(tables: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *of: tuple(np.roll(table, 1, axis=0) for table in tables(*of))


def _swapped(tables: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *of: tables(*of)[::-1]


@pytest.mark.parametrize(
    ("module", "name", "fault", "graphs"),
    [
        (attention, "_rotate", lambda _: _without_rotation, ["decoder"]),
        (attention, "_repeat", lambda _: _interleaved, ["decoder"]),
        (trunk, "rotary_tables", _swapped, ["decoder", "decoder_cpu"]),
        # Turning all positions by the same angle changes nothing: only the first differs, whose table came last.
        (trunk, "rotary_tables", _one_late, ["decoder", "decoder_cpu"]),
    ],
    ids=["no rotation", "heads in another order", "sine for cosine", "positions one late"],
)
def test_the_gates_catch(
    llama: Checkpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    module: Any,
    name: str,
    fault: Callable[[Any], Any],
    graphs: list[str],
) -> None:
    monkeypatch.setattr(module, name, fault(getattr(module, name)))
    export_bundle(llama, tmp_path / "bundle")
    for graph in graphs:
        runtime = on_cpu(open_bundle(tmp_path / "bundle"), graph)
        checks = list(check_logits(runtime, RowLogits(llama), ROWS, GATES["fp32"], 1.0))
        assert not checks[0].passed, checks[0]


def test_a_wrong_epsilon_is_caught(llama: Checkpoint, tmp_path: Path) -> None:
    import copy

    trunk = dataclasses.replace(llama.trunk, causal_lm=copy.copy(llama.trunk.causal_lm))
    trunk.causal_lm.config = copy.deepcopy(trunk.config)
    trunk.causal_lm.config.rms_norm_eps = 1e-2
    export_bundle(dataclasses.replace(llama, trunk=trunk), tmp_path / "bundle")
    runtime = load(tmp_path / "bundle", threads=1)
    assert not next(check_logits(runtime, RowLogits(llama), ROWS, GATES["fp32"], 1.0)).passed

"""Losses through the frozen trunk: whole gradients, however they are cut, and the head's own where only it changes."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from chameleon_deploy.reference import head_losses, trunk_losses
from chameleon_deploy.reference.adapters import adapted
from chameleon_deploy.reference.checkpoint import Checkpoint
from chameleon_deploy.reference.hypernetwork import FactorModule, Hypernetwork, SharedHypernetwork, factor_set
from chameleon_deploy.reference.losses import Objective, losses_of
from chameleon_deploy.reference.model import Trunk
from chameleon_deploy.reference.targets import choose_targets, target_specs
from chameleon_deploy.reference.trunk_losses import TrunkLosses

TEXTS = [[5, 6, 7, 8], [9, 10], [11, 12, 13], [3, 4, 5, 6, 7, 8], [20, 21]]
ROWS = [0, 2, 3, 4]
ALPHA = 0.7


def network(trunk: Trunk, targets: list[str], kind: Any = Hypernetwork) -> FactorModule:
    torch.manual_seed(1)
    made: FactorModule = kind(64, target_specs(trunk, choose_targets(trunk, targets)), 2, (6, 5))
    return made.eval()  # without dropout, so that two runs see the same network


def losses(trunk: Trunk, protocol: str = "masked") -> TrunkLosses:
    return TrunkLosses(trunk, TEXTS, torch.randn(len(TEXTS), 64), protocol, 8, ALPHA)


def gradients(factors: FactorModule) -> list[torch.Tensor]:
    found = [parameter.grad.clone() for parameter in factors.parameters() if parameter.grad is not None]
    factors.zero_grad()
    return found


def whole_loss(trunk: Trunk, factors: FactorModule, u: torch.Tensor) -> torch.Tensor:
    """The mean loss of protocol masked, each text alone, by autograd."""
    total, positions = torch.zeros(()), 0
    with adapted(trunk, factor_set(factors(u[None]), 0, ALPHA)):
        for row in ROWS:
            ids = torch.tensor(TEXTS[row])
            logits = trunk.causal_lm(ids[None]).logits[0, :-1]
            total = total + torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum")
            positions += len(ids) - 1
    return total / positions


@pytest.mark.parametrize("kept", [0, 1 << 30])
@pytest.mark.parametrize("kind", [Hypernetwork, SharedHypernetwork])
@pytest.mark.parametrize("base", ["mini", "llama"])
def test_gradients_are_autograds(
    base: str, kind: Any, kept: int, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    trunk = request.getfixturevalue(base).trunk
    factors, u = network(trunk, ["all"], kind), torch.randn(64)
    expected_loss = whole_loss(trunk, factors, u)
    expected_loss.backward()
    expected = gradients(factors)
    monkeypatch.setattr(trunk_losses, "CHUNK_POSITIONS", 3)
    monkeypatch.setattr(trunk_losses, "TEXTS_AT_ONCE", 3)
    monkeypatch.setattr(trunk_losses, "KEPT_BYTES", kept)
    texts = losses(trunk)
    positions = texts.num_positions(ROWS)
    total = texts.backward(factors, u, ROWS, positions)
    assert total / positions == pytest.approx(float(expected_loss), rel=1e-5)
    assert float(texts.cross_entropy(factors, u, ROWS).mean()) == pytest.approx(float(expected_loss), rel=1e-5)
    for found, wanted in zip(gradients(factors), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-6)
    assert all(parameter.grad is None for parameter in trunk.causal_lm.parameters())


@pytest.mark.parametrize("protocol", ["masked", "paper"])
def test_the_head_alone_has_the_losses_of_hidden_states(mini: Checkpoint, tmp_path: Path, protocol: str) -> None:
    factors, u = network(mini.trunk, ["lm_head"]), torch.randn(64)
    cached = losses_of(mini.trunk, TEXTS, Objective(["lm_head"], ALPHA, protocol, 8), tmp_path)
    assert isinstance(cached, head_losses.HeadLosses)
    found = []
    for texts in (cached, losses(mini.trunk, protocol)):
        assert texts.num_positions(ROWS) == (11 if protocol == "masked" else 4)
        total = texts.backward(factors, u, ROWS, texts.num_positions(ROWS))
        found.append([texts.cross_entropy(factors, u, ROWS), torch.tensor(total), *gradients(factors)])
        found[-1].append(texts.cross_entropy(None, u, ROWS))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)


def test_other_targets_are_read_by_the_trunk(mini: Checkpoint, tmp_path: Path) -> None:
    made = losses_of(mini.trunk, TEXTS, Objective(choose_targets(mini.trunk, ["mlp"]), ALPHA, "masked", 8), tmp_path)
    assert isinstance(made, TrunkLosses)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kept, calls_each", [(0, 2), (1 << 30, 1)])
def test_blocks_of_much_text_are_computed_again_for_the_gradient(
    mini: Checkpoint, monkeypatch: pytest.MonkeyPatch, kept: int, calls_each: int
) -> None:
    monkeypatch.setattr(trunk_losses, "KEPT_BYTES", kept)
    block, calls = mini.trunk.causal_lm.base_model.h[0].mlp, []
    hook = block.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        losses(mini.trunk).backward(network(mini.trunk, ["attention"]), torch.randn(64), ROWS, 11)
    finally:
        hook.remove()
    assert len(calls) == calls_each
    assert "forward" not in vars(mini.trunk.causal_lm.base_model.h[0])


@pytest.mark.parametrize("protocol", ["masked", "paper"])
def test_what_is_kept_is_counted(mini: Checkpoint, monkeypatch: pytest.MonkeyPatch, protocol: str) -> None:
    longest = 8 if protocol == "paper" else 6  # of rows padded to each other, or to max_length
    kept = 4 * longest * 4 * sum(i + o for i, o in mini.trunk.linear_layers().values())
    again: list[Trunk] = []

    def checkpointed(trunk: Trunk) -> AbstractContextManager[None]:
        again.append(trunk)
        return nullcontext()

    monkeypatch.setattr(trunk_losses, "_checkpointed", checkpointed)
    for limit in (kept, kept - 1):
        monkeypatch.setattr(trunk_losses, "KEPT_BYTES", limit)
        losses(mini.trunk, protocol).backward(network(mini.trunk, ["attention"]), torch.randn(64), ROWS, 11)
    assert len(again) == 1


@pytest.mark.parametrize("fused", [True, False])
def test_short_texts_are_read_without_fused_attention(
    mini: Checkpoint, monkeypatch: pytest.MonkeyPatch, fused: bool
) -> None:
    monkeypatch.setattr(trunk_losses, "FUSED_ATTENTION_LENGTH", 6 if fused else 7)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        losses(mini.trunk).cross_entropy(None, torch.randn(64), ROWS)
    operators = {event.name for event in profile.events()}
    assert ("aten::_scaled_dot_product_flash_attention_for_cpu" in operators) == fused

"""What int8 is made of before there is a graph: rotations, a trunk in other coordinates, the rounding of weights."""

from __future__ import annotations

import copy

import hypothesis
import hypothesis.extra.numpy
import numpy as np
import pytest
import torch
from torch import Tensor

from chameleon_deploy.contract.bundle import FloatArray
from chameleon_deploy.export.hadamard import block_of, hadamard, rotate
from chameleon_deploy.export.int8 import gptq
from chameleon_deploy.export.int8.calibration import (
    INT8_MAX,
    MARGIN,
    Products,
    _both_sides,
    calibrate,
    calibration_texts,
    centre_and_steps,
    key_steps,
    steps_of,
)
from chameleon_deploy.export.int8.gptq import round_weights
from chameleon_deploy.export.int8.layers import layers_of
from chameleon_deploy.export.int8.rotation import balance_trunk, rotate_trunk, scale_trunk, turned_keys
from chameleon_deploy.reference.checkpoint import Checkpoint
from chameleon_deploy.terminal.progress import silent
from tests.rounding import nearest

matrices = hypothesis.extra.numpy.arrays(
    np.float32, (7, 3), elements=hypothesis.strategies.floats(-100, 100, width=32)
)  # fmt: skip


@hypothesis.given(matrix=matrices)
def test_weights_are_within_half_a_step_of_their_channel(matrix: FloatArray) -> None:
    int8, scale = nearest(matrix)
    assert int8.dtype == np.int8
    assert int8.min() >= -127
    assert (np.abs(int8 * scale.astype(np.float64) - matrix) <= scale * 0.501).all()


def test_errors_of_weights_cancel_on_activations_that_go_together() -> None:
    """Two groups of channels, as 768 are three; and channels that never occur, whose products are zero."""
    generator = torch.Generator().manual_seed(4)
    common = torch.randn(500, 8, generator=generator)
    x = torch.cat([common @ torch.randn(8, 40, generator=generator), torch.zeros(500, 2)], 1)
    x[:, :40] += 0.05 * torch.randn(500, 40, generator=generator)
    matrix = torch.randn(42, 16, generator=generator)
    parts = x.split(21, 1)
    int8, scale = round_weights(matrix, [part.T @ part for part in parts])
    nearest, same_scale = round_weights(matrix, [torch.eye(21)] * 2)
    assert torch.equal(scale, same_scale)
    assert torch.equal(int8[40:], nearest[40:])

    def error(digits: torch.Tensor) -> float:
        return float((x @ (digits * scale - matrix)).square().mean())

    assert error(int8) < error(nearest) / 4


def test_channels_are_rounded_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the paper, which rounds one channel after another, whatever columns are rounded together."""
    monkeypatch.setattr(gptq, "COLUMNS", 5)
    generator = torch.Generator().manual_seed(7)
    x, matrix = (torch.randn(*shape, generator=generator) for shape in ((60, 21), (21, 12)))
    int8, scale = round_weights(matrix, [x.T @ x])
    damped = (x.T @ x).double()
    damped.diagonal().add_(gptq.DAMPING * damped.diagonal().mean())
    follow = torch.linalg.cholesky(damped.inverse(), upper=True)
    left = matrix.double()
    for i in range(21):
        rounded = (left[i] / scale).round()
        assert torch.equal(int8[i], rounded.to(torch.int8))
        left[i + 1 :] -= torch.outer(follow[i, i + 1 :] / follow[i, i], left[i] - rounded * scale)


@pytest.mark.parametrize(("channels", "block"), [(768, 64), (3072, 64), (64, 64), (48, 16), (32, 16), (100, 4), (7, 1)])
def test_a_rotation_is_its_own_inverse_and_leaves_a_layer_norm_what_it_is(channels: int, block: int) -> None:
    x = 3 + torch.randn(5, channels, generator=torch.Generator().manual_seed(2))
    assert block_of(channels) == block
    assert hadamard(block).abs().allclose(torch.tensor(block**-0.5))
    assert rotate(rotate(x)).allclose(x, atol=1e-5)
    layer_norm = torch.nn.LayerNorm(channels)
    assert layer_norm(rotate(x)).allclose(rotate(layer_norm(x)), atol=1e-5)


@pytest.mark.parametrize("name", ["mini", "llama"])
def test_a_rotated_and_scaled_trunk_computes_the_same(name: str, request: pytest.FixtureRequest) -> None:
    """Also on a Llama with fewer key-value heads than heads. What norms, keys and values are fills the range of int8,
    norms and keys around zero; a Llama's keys are scaled in the graph. The first token's key and value are whole.
    """
    checkpoint: Checkpoint = request.getfixturevalue(name)
    trunk = copy.deepcopy(checkpoint.trunk)
    with torch.no_grad():
        for weights in trunk.causal_lm.parameters():  # norms of new models have no weights to speak of
            if weights.dim() == 1:
                weights.add_(torch.rand(weights.shape, generator=torch.Generator().manual_seed(1)), alpha=0.5)
    ids = torch.from_numpy(np.random.default_rng(6).integers(0, trunk.spec.vocab_size, (3, 40)))
    expected, _ = trunk.hidden_states(ids)
    embedding = trunk.token_embedding.clone()
    rotated = rotate_trunk(trunk)
    assert rotated.token_embedding is trunk.token_embedding  # it is as large as many layers
    assert rotated.is_tied == trunk.is_tied
    assert (rotated.hidden_states(ids)[0] - expected).abs().max() < 1e-4
    texts = calibration_texts(trunk, None)
    statistics = calibrate(rotated, texts, silent)
    balance_trunk(rotated, statistics)
    scale_trunk(rotated, statistics)
    assert (rotated.hidden_states(ids)[0] - expected).abs().max() < 1e-3
    assert torch.equal(trunk.token_embedding, embedding)
    again = calibrate(rotated, texts, silent)
    turned = turned_keys(trunk.spec, statistics)
    for i, (seen, first) in enumerate(zip(again.layers, again.first_tokens, strict=True)):
        for extremes in (seen.norm_1, seen.norm_2):
            centre, steps = centre_and_steps(extremes)
            assert centre.abs().max() < 0.1
            assert torch.allclose(steps, torch.tensor(1.0), rtol=1e-3)
        assert torch.allclose(steps_of(seen.values), torch.tensor(1.0), rtol=0.6 / INT8_MAX)
        assert _is_whole(first.value)
        high, low = seen.keys
        found = turned[i]
        if found is None:
            assert (high - low).abs().max() / 2 < 0.6  # the centre is moved by at most half a step
            assert torch.allclose(key_steps(seen), torch.tensor(1.0), rtol=1e-3)
            assert _is_whole(first.key)
        else:
            centre, steps = (torch.from_numpy(part) for part in found)
            assert _is_whole(first.key.flatten() / steps - centre)
            assert ((high - low).flatten() / 2 / steps - centre).abs().max() < 0.6
    # The statistics have followed what the trunk has become.
    for matrix, products in again.inputs.items():
        for group, followed in zip(products.groups, statistics.inputs[matrix].groups, strict=True):
            assert (group - followed).abs().max() < 1e-3 * group.abs().max(), matrix


def _is_whole(x: Tensor) -> bool:
    return bool((x - x.round()).abs().max() < 0.01)


@pytest.mark.parametrize("offset", [-30.0, 0.0, 30.0])
def test_steps_do_not_depend_on_where_a_range_lies(offset: float) -> None:
    x = torch.linspace(-1, 1, 100) + offset
    centre, steps = centre_and_steps(torch.stack([x.amax(), (-x).amax()])[:, None])
    assert torch.allclose(centre, torch.tensor(offset), atol=1e-4)
    assert torch.allclose(steps, torch.tensor(MARGIN / INT8_MAX), rtol=1e-4)


def test_keys_reach_as_far_as_any_position_takes_them(llama: Checkpoint) -> None:
    """And no farther: a slow pair of coordinates does not come round, so that its range has a centre."""
    angles = torch.tensor([0.9, 0.01, 0.0001]) * torch.arange(200)[:, None]
    keys = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(8)) + torch.tensor([0, 0, 3.0, 0, 0, -3.0])

    def turned(x: Tensor, by: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return torch.cat([a * by.cos() - b * by.sin(), b * by.cos() + a * by.sin()], -1)

    everywhere = torch.stack([turned(keys, by) for by in angles])
    expected = torch.stack([everywhere.amax(0), (-everywhere).amax(0)])
    found = _both_sides(turned(keys, angles[:5]), angles)  # as they stand in a text
    assert (found >= expected - 1e-5).all()
    assert torch.allclose(found, expected, atol=0.05)  # 200 positions do not meet the farthest angle exactly
    high, low = found.amax((1, 2))
    off_centre = (high - low).abs() / (high + low)
    assert off_centre[[0, 3]].max() < 0.01
    assert off_centre[[2, 5]].min() > 0.3


def test_products_follow_a_centre() -> None:
    x, centre = torch.randn(50, 300, generator=torch.Generator().manual_seed(7)) + 2, torch.full((300,), 1.5)
    followed, expected = Products(), Products()
    followed.add(x)
    followed.subtract(centre)
    expected.add(x - centre)
    for ours, theirs in zip(followed.groups, expected.groups, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-2)
    assert torch.allclose(followed.total, expected.total, atol=1e-3)


def test_balanced_channels_cost_less_to_round(llama: Checkpoint) -> None:
    """With one channel of large activations and small weights, and one the reverse, as real models have."""
    rotated = rotate_trunk(llama.trunk)
    layer = next(layers_of(rotated))
    with torch.no_grad():
        for channel, factor in ((3, 300.0), (5, 1 / 300)):
            layer.ups[1].matrix[:, channel] *= factor
            layer.down.matrix[channel] /= factor
    statistics = calibrate(rotated, calibration_texts(llama.trunk, None)[:2], silent)
    name = layer.names.down

    def cost() -> float:
        return float(statistics.inputs[name].squares().sum() * layer.down.matrix.square().sum())

    before = cost()
    ids = torch.arange(40)[None]
    expected, _ = rotated.hidden_states(ids)
    balance_trunk(rotated, statistics)
    assert cost() < before / 100
    assert (rotated.hidden_states(ids)[0] - expected).abs().max() < 1e-4


def test_rotated_an_outlier_hides_nothing_beside_it() -> None:
    """One digit for a row with one channel 50 times the rest, as they come out of real layers."""
    random = np.random.default_rng(3)
    x, matrix = (random.standard_normal(shape, dtype=np.float32) for shape in ((64, 768), (768, 32)))
    x[:, 5] *= 50
    rotated, rotated_matrix = rotate(torch.from_numpy(x)).numpy(), rotate(torch.from_numpy(matrix.T)).numpy().T

    def error(x: FloatArray, matrix: FloatArray) -> float:
        step = np.abs(x).max(1, keepdims=True) / 127
        return float(np.abs((np.rint(x / step) * step - x) @ matrix).mean())

    assert error(rotated, rotated_matrix) < error(x, matrix) / 4

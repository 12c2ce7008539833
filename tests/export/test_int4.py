"""int4 bundles: 4 bits in blocks, read from the same bytes by both graphs, and what is as in int8."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

import chameleon_deploy
from chameleon_deploy.contract.bundle import open_bundle
from chameleon_deploy.export.exporter import export_bundle
from chameleon_deploy.export.int8.gptq import BLOCK, block_scales, round_blocks
from chameleon_deploy.reference.checkpoint import Checkpoint
from chameleon_deploy.reference.inference import RowLogits
from chameleon_deploy.verify import checkpoint_checks
from chameleon_deploy.verify.gates import GATES
from chameleon_deploy.verify.run import VerifyOptions, verification_rows, verify_bundle
from tests.conftest import Exported
from tests.devices import on_cpu


@pytest.fixture
def int4_bundle(exported: Exported) -> Path:
    return exported("tiny", "int4")


def test_values_are_within_half_a_step_of_their_block() -> None:
    """Activations that go their own ways compensate nothing: each weight is rounded to the nearest, in its block."""
    matrix = torch.randn(96, 40, generator=torch.Generator().manual_seed(0))
    matrix[32:64] *= 100  # a block that another scale would erase
    int4, scale = round_blocks(matrix, [torch.eye(96)])
    assert (int(int4.min()), int(int4.max())) == (-8, 7)
    steps = scale.repeat_interleave(BLOCK, 0)
    error = (int4 * steps - matrix).abs()
    inside = (matrix / steps >= -8.5) & (matrix / steps <= 7.5)
    assert (error <= 0.5001 * steps)[inside].all()
    assert inside.float().mean() > 0.97  # what a smaller error of all others pays for is cut off


def test_errors_of_blocks_cancel_on_activations_that_go_together() -> None:
    random = torch.Generator().manual_seed(1)
    x = torch.randn(400, 8, generator=random) @ torch.randn(8, 96, generator=random)
    x += 0.05 * torch.randn(400, 96, generator=random)
    matrix = torch.randn(96, 40, generator=random)
    int4, scale = round_blocks(matrix, [x.T @ x])
    steps = torch.cat([block_scales(block).expand(BLOCK, -1) for block in matrix.split(BLOCK)])
    nearest = (matrix / steps).round().clamp(-8, 7) * steps
    ours, plain = ((x @ (m - matrix)).square().mean() for m in (int4 * scale.repeat_interleave(BLOCK, 0), nearest))
    assert ours < 0.2 * plain


def test_what_is_quantised(int4_bundle: Path) -> None:
    opened = open_bundle(int4_bundle)
    portable, cpu = (ir.load(opened.path / f"{name}.onnx") for name in ("decoder", "decoder_cpu"))
    model = opened.manifest.model
    blocked = [node for node in portable.graph if "block_size" in node.attributes]
    assert [node.op_type for node in blocked] == ["DequantizeLinear"] * 4 * model.num_layers
    assert {node.domain for node in portable.graph} == {""}
    assert dict(portable.opset_imports) == {"": 21}
    counts = Counter(node.op_type for node in cpu.graph)
    assert counts["MatMulNBits"] == counts["BitwiseXor"] == 4 * model.num_layers
    assert counts["MatMulIntegerToFloat"] == 1  # the head
    assert any(len(node.inputs) == 6 and node.inputs[5] is not None for node in cpu.graph), "biases are added apart"
    assert opened.token_embedding().stored.dtype == np.int8


def test_the_weights_are_stored_once(int4_bundle: Path) -> None:
    """The bytes of the portable graph's 4-bit matrices are those of the CPU's."""
    stored = []
    for name, dtype in (("decoder", ir.DataType.INT4), ("decoder_cpu", ir.DataType.UINT8)):
        tensors: list[Any] = [v.const_value for v in ir.load(int4_bundle / f"{name}.onnx").graph.initializers.values()]
        stored.append({(t.offset, t.length) for t in tensors if t.dtype == dtype and isinstance(t, ir.ExternalTensor)})
    portable, cpu = stored
    assert portable == cpu
    assert portable


def test_the_gates_of_int4_on_a_trained_model(tiny: Checkpoint, int4_bundle: Path) -> None:
    checks, record = verify_bundle(int4_bundle, tiny, lambda *_: None, VerifyOptions(threads=1))
    assert record["precision"] == "int4"
    assert not [check for check in checks if not check.passed]
    assert {check.graph for check in checks} == {"decoder", "decoder_cpu"}


@pytest.mark.parametrize("fault", ["scales", "order"])
def test_the_gates_catch_wrong_weights(
    fault: str, tiny: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scales that are too large, and the two values of a byte in the other order."""

    def wrong(*args: Any) -> Any:
        int4, scale = round_blocks(*args)
        if fault == "scales":
            return int4, scale * 1.5
        return int4.view(-1, 2, int4.shape[1]).flip(1).flatten(0, 1), scale

    monkeypatch.setattr("chameleon_deploy.export.int8.weights.round_blocks", wrong)
    export_bundle(tiny, tmp_path / "wrong", precision="int4")
    rows = verification_rows(tiny)
    for graph in ("decoder", "decoder_cpu"):
        runtime = on_cpu(open_bundle(tmp_path / "wrong"), graph)
        checks = checkpoint_checks.check_logits(runtime, RowLogits(tiny), rows, GATES["int4"], 1.0)
        assert any(not check.passed for check in checks)


def test_a_neighbour_changes_no_bit(exported: Exported) -> None:
    runtime = chameleon_deploy.load(exported("llama", "int4"), mode="none", threads=2)
    random = np.random.default_rng(3)
    row = random.integers(0, 512, 40).tolist()
    scores, tokens = [], []
    for _ in range(3):
        other = random.integers(0, 512, 40).tolist()
        scores.append(runtime.score([row, other])[0].token_logprobs)
        tokens.append(runtime.generate([row, other], max_new_tokens=8)[0].token_ids)
    assert scores[0] == scores[1] == scores[2]
    assert tokens[0] == tokens[1] == tokens[2]

"""int8 bundles: what is quantised, that no row enters another, and the gates on a trained model."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnxscript import GraphBuilder

import chameleon_deploy
from chameleon_deploy import Runtime
from chameleon_deploy.contract.bundle import FloatArray, TargetSpec, open_bundle
from chameleon_deploy.errors import TensorError
from chameleon_deploy.export.exporter import export_bundle
from chameleon_deploy.export.hypernetwork import build_hypernetwork
from chameleon_deploy.export.int8.adapters import calibrate_with_factors
from chameleon_deploy.export.int8.calibration import calibrate, calibration_texts
from chameleon_deploy.export.int8.digits import costs, take_two
from chameleon_deploy.export.int8.gptq import round_weights
from chameleon_deploy.export.int8.layers import layers_of
from chameleon_deploy.export.int8.rotation import rotate_trunk, scale_trunk
from chameleon_deploy.export.int8.rows import quantize_rows
from chameleon_deploy.export.weights import WeightsFile
from chameleon_deploy.reference.checkpoint import Checkpoint
from chameleon_deploy.reference.families import decoder_spec
from chameleon_deploy.reference.hypernetwork import Hypernetwork
from chameleon_deploy.reference.inference import RowLogits
from chameleon_deploy.reference.random import base_config
from chameleon_deploy.runtime.decode.logits import HostLogits
from chameleon_deploy.runtime.decode.session import _convert_weights, exact_weights
from chameleon_deploy.runtime.decode.shared_cache import SharedCacheDecoder
from chameleon_deploy.runtime.decode.slots import Slots
from chameleon_deploy.terminal.progress import silent
from chameleon_deploy.verify import checkpoint_checks, promises
from chameleon_deploy.verify.gates import GATES, gate_of
from chameleon_deploy.verify.run import VerifyOptions, verification_rows, verify_bundle
from tests.conftest import Exported
from tests.rounding import nearest
from tests.verification import CACHE_FAULTS, damage_cache


@pytest.fixture
def int8_bundle(exported: Exported) -> Path:
    return exported("tiny", "int8")


@pytest.fixture
def llama_int8(exported: Exported) -> Path:
    return exported("llama", "int8")


LLAMA = decoder_spec(base_config("llama-mini"))
KINDS = {  # of products: the name of a matrix
    "rows": "model.layers.1.mlp.down_proj.weight.int8",
    "rows, two values": "model.layers.0.mlp.down_proj.weight.int8",
    "after a norm": "model.layers.1.mlp.gate_up_proj.weight.int8",
    "after a norm, two values": "model.layers.0.mlp.gate_up_proj.weight.int8",
}
TWO = {"model.layers.0.mlp.down_proj.weight", "model.layers.0.mlp.gate_up_proj.weight"}


def _product(kind: str, weight: FloatArray) -> Any:
    """A function from x [n, in] to y [n, out] with int8 weights: ours, or ONNX Runtime's one scale for all."""
    int8, scale = nearest(weight)
    builder = GraphBuilder(ir.Graph([], [], nodes=[], opset_imports={"": 20, "com.microsoft": 1}, name=kind))
    op, graph = builder.op, builder.graph
    x = builder.input("x", ir.DataType.FLOAT, ["n", 1, len(weight)])
    builder.input("input_ids", ir.DataType.INT64, ["n", 1])
    w, s = builder.initializer(ir.tensor(int8), KINDS.get(kind, "w")), builder.initializer(ir.tensor(scale), "s")
    if kind != "dynamic":
        y = op.MatMul(x, op.DequantizeLinear(w, s, axis=1))
    else:
        y = op.DynamicQuantizeMatMul(x, w, s, _domain="com.microsoft")
    builder.add_output(y, "y")
    graph.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    model = ir.Model(graph, ir_version=10)
    if kind != "dynamic":
        assert quantize_rows(model, LLAMA, TWO) == 1
    options = onnxruntime.SessionOptions()
    _convert_weights(options, exact_weights())
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return lambda x: session.run(None, {"x": x[:, None], "input_ids": np.zeros((len(x), 1), np.int64)})[0][:, 0]


@pytest.mark.parametrize(("kind", "leaks"), [*((kind, False) for kind in KINDS), ("dynamic", True)])
@pytest.mark.parametrize("n", [2, 8, 300])
def test_editing_a_row_changes_no_bit_of_another(kind: str, leaks: bool, n: int) -> None:
    random = np.random.default_rng(0)
    weight = random.standard_normal((768, 96), dtype=np.float32)
    product = _product(kind, weight)
    x = random.standard_normal((n, 768), dtype=np.float32)
    edited = x.copy()
    edited[0] *= 50
    before, after = (product(rows) for rows in (x, edited))
    assert (np.abs(before[1:] - after[1:]).max() > 0.01) == leaks
    assert leaks or before[1:].tobytes() == after[1:].tobytes()


def test_two_digits_lose_next_to_nothing() -> None:
    """A row with an outlier of 1,000 times the rest, as real activations have: one digit would keep 6 % of a step."""
    random = np.random.default_rng(1)
    weight = random.standard_normal((256, 32), dtype=np.float32)
    x = random.standard_normal((4, 256), dtype=np.float32)
    x[:, 7] *= 1000
    int8, scale = nearest(weight)
    exact = x.astype(np.float64) @ (int8 * scale.astype(np.float64))
    error = np.abs(_product("rows, two values", weight)(x) - exact).max()
    one_digit = np.rint(x / np.abs(x).max(1, keepdims=True) * 127) * np.abs(x).max(1, keepdims=True) / 127
    assert error < 0.02 * np.abs(one_digit @ (int8 * scale) - exact).max()


def test_two_digits_after_a_norm_reach_beyond_the_range_of_one() -> None:
    x = np.full((1, 16), 200, np.float32)  # in steps, of which calibration has seen 127 at most
    one, two = (
        _product(kind, np.ones((16, 4), np.float32))(x) for kind in ("after a norm", "after a norm, two values")
    )
    assert np.allclose(one, 16 * 127)
    assert np.allclose(two, 16 * 200)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_of_zeros(kind: str) -> None:
    x = np.zeros((2, 16), np.float32)
    x[1] = 1
    y = _product(kind, np.ones((16, 4), np.float32))(x)
    assert (y[0] == 0).all()
    assert np.allclose(y[1], 16)


@pytest.mark.parametrize(("fixture", "products"), [("int8_bundle", 5 * 4 + 1), ("llama_int8", 2 * 4 + 1)])
def test_what_is_quantised(fixture: str, products: int, request: pytest.FixtureRequest) -> None:
    opened = open_bundle(request.getfixturevalue(fixture))
    assert opened.manifest.precision == "int8"
    portable, cpu = (ir.load(opened.path / f"{name}.onnx") for name in ("decoder", "decoder_cpu"))
    assert Counter(node.op_type for node in portable.graph)["DequantizeLinear"] == products + 1  # the token lookup
    assert {node.domain for node in portable.graph} == {""}
    assert set(portable.opset_imports) == {""}
    assert Counter(node.op_type for node in cpu.graph)["MatMulIntegerToFloat"] == products
    has_bias = [n for n in cpu.graph if n.op_type == "MatMulIntegerToFloat" and len(n.inputs) == 7]
    assert has_bias, "biases are added apart"
    model = opened.manifest.model
    assert Counter(node.op_type for node in cpu.graph)["If"] == model.num_layers
    for name, dtype in (("decoder", "float32"), ("decoder_cpu", "int8")):
        graph = opened.manifest.graphs[name]
        cached = [
            spec.dtype for spec in (*graph.inputs, *graph.outputs) if "past_key" in spec.name or "present" in spec.name
        ]
        assert cached == [dtype] * 4 * model.num_layers
    for portable_or_cpu in (portable.graph, cpu.graph):
        matrices = {
            str(value.name)
            for value in portable_or_cpu.initializers.values()
            if value.dtype == ir.DataType.FLOAT and value.shape and value.shape.rank() == 2
        }
        # Tables of positions stay float32, the rotation of activations, and what sums their two values.
        float32 = (".wpe.", "rotary", "int8_weights.rotation_", "int8_rows.parts")
        assert all(any(part in name for part in float32) for name in matrices), matrices
    assert opened.token_embedding().stored.dtype == np.int8
    assert opened.manifest.token_embedding.shape == (model.vocab_size, model.hidden_size)
    assert {file.name for file in opened.path.iterdir()} == {*opened.manifest.files, "bundle.json"}


def test_the_gates_of_int8_on_a_trained_model(tiny: Checkpoint, int8_bundle: Path) -> None:
    checks, record = verify_bundle(int8_bundle, tiny, lambda *_: None, VerifyOptions(threads=1))
    assert record["precision"] == "int8"
    missed = [check for check in checks if not check.passed]
    assert not missed
    assert {check.graph for check in checks} == {"decoder", "decoder_cpu"}


def test_clusters_and_factors_come_from_int8_rows(tiny: Checkpoint, exported: Exported) -> None:
    """The head's: clusters are those of float32, factors nearly."""
    rows = verification_rows(tiny)
    runtimes = [chameleon_deploy.load(path) for path in (exported("tiny", "fp32"), exported("tiny", "int8"))]
    exact, reduced = (runtime.adapt(rows, mode="centroid") for runtime in runtimes)
    assert exact.cluster_ids.tolist() == reduced.cluster_ids.tolist()
    assert 0 < np.abs(exact.embeddings - reduced.embeddings).max() < 5e-3
    exact, reduced = (runtime.adapt(rows, mode="request") for runtime in runtimes)
    for name, array in exact.factors.sets.tensors.items():
        difference = np.asarray(reduced.factors.sets.tensors[name]) - np.asarray(array)
        assert np.linalg.norm(difference) < 0.02 * np.linalg.norm(np.asarray(array))


def test_the_head_and_the_embedding_are_stored_once(int8_bundle: Path) -> None:
    graphs = [
        ir.load(int8_bundle / f"{name}.onnx").graph.initializers for name in ("decoder", "decoder_cpu", "hidden_scorer")
    ]
    head: Any = graphs[0]["lm_head.weight.int8"].const_value
    for initializers in graphs:
        for name, value in initializers.items():
            tensor: Any = value.const_value
            if name.startswith(("lm_head.weight.int8", "transformer.wte.weight.int8")):
                assert head.offset <= tensor.offset < tensor.offset + tensor.nbytes <= head.offset + head.nbytes


def test_the_hypernetwork_is_stored_in_float16(int8_bundle: Path) -> None:
    """Its last layer: nearly all of its bytes."""
    stored = {str(v.name): v.dtype for v in ir.load(int8_bundle / "hypernetwork.onnx").graph.initializers.values()}
    halves = {name for name, dtype in stored.items() if dtype == ir.DataType.FLOAT16}
    assert halves == {"lm_head.lora_A.weight", "lm_head.lora_B.weight"}


def test_factors_that_float16_cannot_hold_are_refused(tmp_path: Path) -> None:
    target = TargetSpec("lm_head", LLAMA.hidden_size, LLAMA.vocab_size)
    network = Hypernetwork(4, [target], 1, ()).requires_grad_(False)
    network.linears()[-1].weight.fill_(1)
    with WeightsFile(tmp_path / "fits") as file:
        build_hypernetwork(network, 4, 65504, file, float16=True)
    with WeightsFile(tmp_path / "overflows") as file, pytest.raises(TensorError, match=r"lora_B.weight holds values"):
        build_hypernetwork(network, 4, 65536, file, float16=True)


def slots_of(runtime: Runtime, rows: int, capacity: int) -> Slots:
    assert isinstance(runtime.decoder, SharedCacheDecoder)
    return runtime.decoder.slots(rows, capacity)


@pytest.mark.parametrize("fixture", ["int8_bundle", "llama_int8"])
def test_a_neighbour_changes_no_bit(fixture: str, request: pytest.FixtureRequest) -> None:
    runtime = chameleon_deploy.load(request.getfixturevalue(fixture), mode="centroid", threads=2)
    vocab_size = runtime.manifest.model.vocab_size
    random = np.random.default_rng(3)
    row = random.integers(0, vocab_size, 40).tolist()
    scores, steps = [], []
    for _ in range(3):
        other = random.integers(0, vocab_size, 40).tolist()
        scores.append(runtime.score([row, other])[0].token_logprobs)
        factors = runtime.adapt([row, other], mode="none").factors
        slots = slots_of(runtime, 2, 50)
        slots.prefill(0, [row, other], factors)
        steps.append([slots.step([5, 9], factors)[0].tobytes() for _ in range(4)])
    assert scores[0] == scores[1] == scores[2]
    assert steps[0] == steps[1] == steps[2]


@pytest.mark.parametrize("fixture", ["int8_bundle", "llama_int8"])
def test_a_text_sees_the_same_cache_in_pieces(fixture: str, request: pytest.FixtureRequest) -> None:
    """Read whole, in two pieces, and token by token: what is written into the buffer is the same."""
    runtime = chameleon_deploy.load(request.getfixturevalue(fixture), threads=2)
    ids = np.random.default_rng(4).integers(0, runtime.manifest.model.vocab_size, 40).tolist()
    factors = runtime.adapt([ids], mode="none").factors
    caches = []
    for chunk, first in ((40, 40), (16, 40), (40, 1)):
        slots = slots_of(runtime, 1, 50)
        for start in range(0, first, chunk):
            logits = slots.prefill(0, [ids[start : min(start + chunk, first)]], factors, 1)[0]
        for token in ids[first:]:
            logits = slots.step([token], factors)
        caches.append(([buffer[:, :, :40].copy() for buffer in slots._cache], np.array(logits)))
    (whole, expected), *others = caches
    assert all(buffer.dtype == np.int8 and np.abs(buffer).max() > 50 for buffer in whole)
    for buffers, logits in others:
        for ours, theirs in zip(buffers, whole, strict=True):
            # A last bit of a sum can round a number the other way, which goes on from layer to layer: up to 0.21 of
            # all values then differ, by 1 or 2. A wrong cache differs nearly everywhere.
            assert (ours != theirs).mean() < 0.3
            assert np.abs(ours.astype(int) - theirs).max() <= 3
        assert np.abs(logits - expected).max() < GATES["int8"].rounding_tolerance


def test_keys_and_values_are_within_what_was_calibrated(tiny: Checkpoint, int8_bundle: Path) -> None:
    """On texts that calibration has not read, next to nothing is cut off, and the steps are not much too coarse."""
    runtime = chameleon_deploy.load(int8_bundle, threads=1)
    rows = verification_rows(tiny, more=True)
    slots = slots_of(runtime, len(rows), 300)
    slots.prefill(0, rows, runtime.adapt(rows, mode="none").factors)
    for buffer in slots._cache:
        used = np.concatenate([row[:, : len(ids)] for row, ids in zip(buffer, rows, strict=True)], axis=1)
        assert (np.abs(used.astype(int)) >= 127).mean() < 2e-3  # keys: their range has no margin
        assert np.median(np.abs(used.astype(int)).max(1)) > 80


def _difference(path: Path, checkpoint: Checkpoint) -> float:
    """Of the bundle's logits from the reference's, beside the standard deviation of those."""
    runtime = chameleon_deploy.load(path, threads=1, mode="none")
    ids = np.random.default_rng(5).integers(0, runtime.manifest.model.vocab_size, 60).tolist()
    factors = runtime.adapt([ids], mode="none").factors
    (_, logits), *_ = runtime.decoder.all_logits([ids], factors)
    hidden, _ = checkpoint.trunk.hidden_states(torch.tensor([ids]))
    expected = (hidden[0] @ checkpoint.trunk.head_weight.T).numpy()
    return float(np.abs(np.asarray(logits)[0] - expected).max() / expected.std())


@pytest.mark.parametrize("name", ["mini", "llama"])
def test_both_ends_of_the_residual_stream_are_rotated(
    name: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a graph in which they are not is seen."""
    checkpoint = request.getfixturevalue(name)
    export_bundle(checkpoint, tmp_path / "right", precision="int8")
    monkeypatch.setattr("chameleon_deploy.export.graphs.rotate_residual", lambda *_: None)
    export_bundle(checkpoint, tmp_path / "wrong", precision="int8")
    assert _difference(tmp_path / "right", checkpoint) < 1 < 3 < _difference(tmp_path / "wrong", checkpoint)


def test_one_percent_of_another_row_is_caught(
    tiny: Checkpoint, int8_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Less than rounding explains in a cache, and more than the order of sums explains between calls."""
    runtime, gate = chameleon_deploy.load(int8_bundle, threads=1), gate_of("int8", "cpu")
    rows, all_logits = verification_rows(tiny), runtime.decoder.all_logits
    assert all(check.passed for check in promises.check_batching(runtime, rows, gate))

    def leaky(*arguments: Any) -> Any:
        for start, logits in all_logits(*arguments):
            values = np.asarray(logits)
            yield start, HostLogits(values + np.float32(0.01) * np.roll(values, 1, axis=0) * (len(values) > 1))

    monkeypatch.setattr(runtime.decoder, "all_logits", leaky)
    assert not any(check.passed for check in promises.check_batching(runtime, rows, gate))


@pytest.mark.parametrize("fault", [None, *CACHE_FAULTS])
def test_the_gates_catch_a_wrong_cache(
    fault: Any, tiny: Checkpoint, int8_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the KL divergence alone: a single logit is not limited in int8."""
    runtime = chameleon_deploy.load(int8_bundle, threads=1)
    if fault:
        damage_cache(runtime, fault, monkeypatch)
    rows = sorted(verification_rows(tiny, more=True), key=len)[-8:]
    checks = list(checkpoint_checks.check_cache(runtime, RowLogits(tiny), rows, GATES["int8"]))
    means = [check for check in checks if "KL, mean" in check.name]
    assert len(means) == 2
    assert all(check.passed == (fault is None) for check in means)
    if fault:
        assert all(check.limit is not None and check.value > 2 * check.limit for check in means)


@pytest.mark.parametrize("factor", [0.2, 20])
@pytest.mark.parametrize("what", [("keys", "values"), ("norm_1", "norm_2")])
def test_the_gates_catch_steps_that_are_cut_off_or_coarse(
    what: tuple[str, str], factor: float, tiny: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*args: Any) -> Any:
        statistics = calibrate_with_factors(*args)
        for layer in statistics.layers:
            for name in what:
                getattr(layer, name).mul_(factor)
        return statistics

    monkeypatch.setattr("chameleon_deploy.export.graphs.calibrate_with_factors", wrong)
    export_bundle(tiny, tmp_path / "wrong", precision="int8")
    runtime = chameleon_deploy.load(tmp_path / "wrong", threads=1)
    rows = sorted(verification_rows(tiny, more=True), key=len)[-8:]
    checks = list(checkpoint_checks.check_cache(runtime, RowLogits(tiny), rows, GATES["int8"]))
    against_reference = [check for check in checks if check.name.startswith("cached decoding: KL")]
    assert [check.passed for check in against_reference] == [False, False]


def test_the_gates_catch_a_wrong_scale(tiny: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*args: Any) -> Any:
        int8, scale = round_weights(*args)
        return int8, scale * 1.1

    monkeypatch.setattr("chameleon_deploy.export.int8.weights.round_weights", wrong)
    export_bundle(tiny, tmp_path / "wrong", precision="int8")
    runtime = chameleon_deploy.load(tmp_path / "wrong", threads=1)
    rows = verification_rows(tiny)
    checks = checkpoint_checks.check_logits(runtime, RowLogits(tiny), rows, GATES["int8"], 1.0)
    assert any(not check.passed for check in checks)


def test_second_values_go_where_they_save_most_for_their_time() -> None:
    costs = {"a": 6.0, "b": 5.0, "c": 1.0, "d": 0.1}
    sizes = {"a": 600, "b": 100, "c": 100, "d": 10}
    assert take_two(costs, sizes, 210) == {"b", "c", "d"}  # a costs most and is too large
    assert take_two(costs, sizes, 710) == {"a", "b", "d"}
    assert take_two(costs, sizes, 0) == frozenset()


def test_the_cost_of_rounding_a_matrix_is_what_it_is_measured_to_be(tiny: Checkpoint) -> None:
    """Of the inputs of one matrix after a norm: the KL divergence of a model that rounds them."""
    trunk, texts = rotate_trunk(tiny.trunk), calibration_texts(tiny.trunk, None)
    scale_trunk(trunk, calibrate(trunk, texts, silent))
    layer = list(layers_of(trunk))[1]
    predicted = costs(trunk, texts, silent)[layer.names.up]

    def logprobs(rows: torch.Tensor) -> torch.Tensor:
        return torch.log_softmax(trunk.hidden_states(rows)[0] @ trunk.head_weight.T, -1)

    rows = texts[0][:, :256]
    exact = logprobs(rows)
    hook = layer.readers[2].register_forward_pre_hook(lambda module, inputs: (inputs[0].round(),))
    measured = float((exact.exp() * (exact - logprobs(rows))).sum(-1).mean())
    hook.remove()
    assert measured / 2 < predicted < measured * 2

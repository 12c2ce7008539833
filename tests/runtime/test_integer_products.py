"""Integer products: ONNX Runtime is asked which weights it multiplies exactly on this processor."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
import pytest

import chameleon_deploy
from chameleon_deploy import inspect
from chameleon_deploy.contract.bundle import open_bundle
from chameleon_deploy.errors import ProviderError
from chameleon_deploy.reference.checkpoint import Checkpoint
from chameleon_deploy.runtime import backend
from chameleon_deploy.runtime.decode import session
from chameleon_deploy.runtime.decode.session import IntegerWeights
from chameleon_deploy.serve.service import Service
from chameleon_deploy.serve.settings import Settings
from chameleon_deploy.verify import checkpoint_checks
from chameleon_deploy.verify.gates import Check
from chameleon_deploy.verify.run import VerifyOptions, verify_bundle
from tests.make_data import integer_products

TEXTS = ["the sums", "of a processor without", "VNNI are exact as well"]
FORMS: tuple[IntegerWeights, ...] = get_args(IntegerWeights)


@pytest.fixture(scope="module")
def int8_bundle(int8_runtime: chameleon_deploy.Runtime) -> Path:
    return int8_runtime.bundle.path


def loaded(path: Path, weights: str, monkeypatch: pytest.MonkeyPatch, **options: Any) -> chameleon_deploy.Runtime:
    with monkeypatch.context() as patch:
        patch.setattr(session, "exact_weights", lambda: weights)
        return chameleon_deploy.load(path, threads=1, **options)


def test_the_stored_graph_is_the_one_that_its_script_builds() -> None:
    assert session.INTEGER_PRODUCTS.read_bytes() == integer_products()


def test_a_form_that_is_exact_here_is_chosen_for_int8_bundles_alone(int8_bundle: Path, bundle: Path) -> None:
    assert session._are_exact(session.exact_weights())
    assert chameleon_deploy.load(int8_bundle).integer_weights == session.exact_weights()
    assert chameleon_deploy.load(bundle).integer_weights is None
    manifest = open_bundle(int8_bundle).manifest
    assert {name for name, graph in manifest.graphs.items() if graph.providers == ("cpu",)} == {
        "decoder_cpu", "hidden_scorer",
    }  # fmt: skip


def test_both_forms_give_the_same_bits_where_both_are_exact(int8_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, converted = (loaded(int8_bundle, weights, monkeypatch) for weights in FORMS)
    assert (plain.integer_weights, converted.integer_weights) == FORMS
    scores, others = (
        np.concatenate([score.token_logprobs for score in runtime.score(TEXTS)]) for runtime in (plain, converted)
    )
    if session._are_exact("int8"):
        assert scores.tolist() == others.tolist()
        assert plain.generate(TEXTS, max_new_tokens=8) == converted.generate(TEXTS, max_new_tokens=8)
    else:
        assert np.abs(scores - others).max() > 1e-2  # saturated


def test_shared_weights_are_stored_apart_for_each_form(
    int8_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHAMELEON_DEPLOY_CACHE", str(tmp_path))
    types = {}
    for weights in FORMS:
        before = set(tmp_path.glob("*/*/decoder_cpu.onnx"))
        shared = loaded(int8_bundle, weights, monkeypatch, share_weights=True)
        (stored,) = set(tmp_path.glob("*/*/decoder_cpu.onnx")) - before
        types[weights] = types_of_weights(onnx.load(stored, load_external_data=False))
        assert shared.score(TEXTS) == loaded(int8_bundle, weights, monkeypatch).score(TEXTS)
    assert types["int8"] == {onnx.TensorProto.INT8}
    if has_avx2():  # elsewhere ONNX Runtime sees no need to convert
        assert types["uint8"] == {onnx.TensorProto.UINT8}


def types_of_weights(model: onnx.ModelProto) -> set[int]:
    """Of all integer products of an optimised graph."""
    constants = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    return {constants[node.input[1]] for node in model.graph.node if node.op_type == "MatMulIntegerToFloat"}


def has_avx2() -> bool:
    return platform.machine() == "x86_64" and " avx2 " in Path("/proc/cpuinfo").read_text()


@pytest.mark.parametrize(("exact", "chosen"), [(FORMS, "int8"), (("int8",), "int8"), (("uint8",), "uint8"), ((), None)])
def test_the_first_form_whose_sums_are_right_is_chosen(
    exact: tuple[str, ...], chosen: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime's sums are replaced by those of a processor on which some forms are exact."""

    class Processor:
        def __init__(self, path: Path, options: Any, execution_provider: Any) -> None:
            try:
                options.get_session_config_entry("session.x64quantprecision")
                self.weights = "uint8"
            except RuntimeError:  # it is not set
                self.weights = "int8"

        def run(self, names: list[str], inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
            return [sums(inputs["activations"], saturates=self.weights not in exact)]

    monkeypatch.setattr(session, "_create_session", Processor)
    if chosen is None:
        with pytest.raises(ProviderError, match="sums integer products wrongly on this processor"):
            session.exact_weights.__wrapped__()
    else:
        assert session.exact_weights.__wrapped__() == chosen


def sums(activations: np.ndarray, saturates: bool) -> np.ndarray:
    """The sums of the stored graph; of VPMADDUBSW, those of neighbouring products saturate at 16 bits."""
    weights = np.tile([127, -128], (64, 16))
    products = activations.astype(np.int64)[:, :, None] * weights
    pairs = products.reshape(len(activations), 32, 2, 32).sum(2)
    total = (pairs.clip(-(2**15), 2**15 - 1) if saturates else pairs).sum(1)
    return np.asarray(total - 128 * weights.sum(0), np.float32)


def test_the_answer_is_shown_and_recorded(
    int8_bundle: Path, mini: Checkpoint, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On a processor where int8 weights would saturate."""
    for module in (session, backend):
        monkeypatch.setattr(module, "integer_weights", lambda bundle, graph: "uint8")
    monkeypatch.setattr(checkpoint_checks, "verify_checkpoint", lambda *_, **__: [Check("a", 1, 2)])
    monkeypatch.setattr(inspect, "integer_weights", lambda bundle, graph: "uint8")
    _, record = verify_bundle(int8_bundle, mini, lambda *_: None, VerifyOptions(threads=1))
    assert record["integer_weights"] == "uint8"
    assert inspect.record(open_bundle(int8_bundle))["integer_weights"] == "uint8"
    with caplog.at_level("INFO", "chameleon_deploy.serve"):
        service = Service(Settings(int8_bundle, threads=1))
        service.open()
        service.abort()
    assert "int8 on cpu, uint8 weights in integer products" in caplog.text

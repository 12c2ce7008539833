"""Every exported graph becomes a TensorRT engine, and what cannot become one is refused with our message.

TensorRT for RTX parses and builds without a GPU; what it builds cannot run here.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from chameleon_deploy.contract.bundle import Precision, TensorSpec, open_bundle
from chameleon_deploy.errors import EngineError, OutputError, ProfileError
from chameleon_deploy.export.exporter import export_bundle
from chameleon_deploy.export.tensorrt import build_engine, build_engines
from chameleon_deploy.reference.adapters import load_adapted
from chameleon_deploy.reference.checkpoint import Checkpoint
from chameleon_deploy.reference.model import trunk_from
from chameleon_deploy.runtime.device import engines
from chameleon_deploy.runtime.device.engines import Device, engine_graphs
from chameleon_deploy.runtime.device.profiles import Profile, Range, profiles
from chameleon_deploy.store import local_cache
from tests.adapters import save_adapter
from tests.commands import run
from tests.conftest import Exported
from tests.families import small_model

TENSORRT = engines.import_tensorrt()


def ignore(what: str, done: int, total: int) -> None:
    pass


@pytest.fixture(scope="module")
def device() -> Device:
    return engines.target_device(TENSORRT)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CHAMELEON_DEPLOY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_every_graph_of_a_bundle_becomes_an_engine_once(bundle: Path, device: Device) -> None:
    told: list[tuple[str, int, int]] = []
    path, built_for = build_engines(bundle, lambda *progress: told.append(progress))
    names = engine_graphs(open_bundle(bundle).manifest)
    assert set(names) == {"decoder", "hypernetwork", "chooser", "logits_scorer"}
    assert {file.name for file in path.iterdir()} == {"entry.json", *(f"{name}.engine" for name in names)}
    assert built_for == device
    assert engines.find_engines(open_bundle(bundle), TENSORRT, device) == path
    for name in names:
        steps = [done for what, done, total in told if what == f"engine {name}" and total == 1000]
        assert steps == sorted(steps)
        assert steps[-1] == 1000
    before = {file: file.stat().st_mtime_ns for file in path.glob("*.engine")}
    assert build_engines(bundle, ignore)[0] == path
    assert {file: file.stat().st_mtime_ns for file in path.glob("*.engine")} == before


@pytest.mark.parametrize("family", ["mini", "llama"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8", "int4"])
def test_every_precision_of_both_families(family: str, precision: Precision, exported: Exported) -> None:
    path, _ = build_engines(exported(family, precision), ignore)
    assert {file.stem for file in path.iterdir()} == {"entry", "decoder", "hypernetwork", "chooser", "logits_scorer"}


@pytest.mark.parametrize("family", ["gpt_neox", "phi3", "gemma2"])
def test_decoders_of_families_with_other_operators(
    family: str, llama: Checkpoint, device: Device, tmp_path: Path
) -> None:
    checkpoint = replace(llama, trunk=trunk_from(small_model(family), llama.trunk.tokenizer))
    export_bundle(checkpoint, tmp_path / "b")
    assert _build(tmp_path / "b" / "decoder.onnx", tmp_path / "b", "decoder", device)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_decoders_with_adapters_of_the_trunk(
    family: str, precision: Precision, mini_path: Path, llama_path: Path, tmp_path: Path
) -> None:
    base = {"gpt2": mini_path, "llama": llama_path}[family] / "base"
    directory = save_adapter(base, tmp_path / "peft", r=2, target_modules="all-linear")
    export_bundle(load_adapted(str(base), {"own": directory}), tmp_path / "b", precision=precision)
    path, _ = build_engines(tmp_path / "b", ignore)
    assert {file.stem for file in path.iterdir()} == {"entry", "decoder", "chooser", "logits_scorer"}


def test_tampered_engines_are_built_again(bundle: Path) -> None:
    """Other damage, and entries of other machines: test_local_cache.py and test_device_engines.py."""
    path, _ = build_engines(bundle, ignore)
    engine = path / "chooser.engine"
    whole = engine.read_bytes()
    engine.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert local_cache.find("engines", engines.engine_key(*_key_of(bundle))) is None
    assert build_engines(bundle, ignore)[0] == path
    assert local_cache.find("engines", engines.engine_key(*_key_of(bundle))) == path
    assert engine.stat().st_size == len(whole)


def _key_of(bundle: Path) -> Any:
    return open_bundle(bundle), TENSORRT, engines.target_device(TENSORRT)


def test_tf32_is_off_and_the_network_strongly_typed(
    bundle: Path, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[bool, bool]] = []

    build = TENSORRT.Builder.build_serialized_network

    def watched(builder: Any, network: Any, config: Any) -> Any:
        strongly_typed = network.get_flag(TENSORRT.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        seen.append((config.get_flag(TENSORRT.BuilderFlag.TF32), strongly_typed))
        return build(builder, network, config)

    monkeypatch.setattr(TENSORRT.Builder, "build_serialized_network", watched)
    _build(bundle / "hypernetwork.onnx", bundle, "hypernetwork", device)
    assert seen == [(False, True)]


def _build(file: Path, bundle: Path, like: str, device: Device) -> memoryview:
    """An engine of a file, with the inputs and profiles of one of the bundle's graphs."""
    manifest = open_bundle(bundle).manifest
    graph = manifest.graphs[like]
    return build_engine(TENSORRT, device, file, graph.inputs, profiles(manifest, graph), ignore)


def _unknown_operator(decoder: onnx.ModelProto) -> None:
    node = next(node for node in decoder.graph.node if node.op_type == "Gelu")
    node.op_type, node.domain = "FastGelu", "com.example"
    decoder.opset_import.append(helper.make_opsetid("com.example", 1))


def _attention_of_opset_23(decoder: onnx.ModelProto) -> None:
    node = next(node for node in decoder.graph.node if node.op_type == "Softmax")
    node.op_type, node.input[:] = "Attention", [node.input[0]] * 3
    del node.attribute[:]
    decoder.opset_import[0].version = 23


def _missing_tensor(decoder: onnx.ModelProto) -> None:
    next(node for node in decoder.graph.node if node.op_type == "Softmax").input[0] = "nowhere"


def _other_input(decoder: onnx.ModelProto) -> None:
    decoder.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_unknown_operator, "cannot read it: operator FastGelu at node "),
        (_attention_of_opset_23, "cannot build an engine from it: .*Attention"),
        (_missing_tensor, "cannot read it: "),
        (_other_input, r"differ from the manifest at 'input_ids': \(1, -1\), not \(-1, -1\)"),
    ],
)
def test_a_graph_that_tensorrt_cannot_take_is_refused(
    damage: Callable[[Any], None],
    message: str,
    bundle: Path,
    device: Device,
    copy_of: Callable[[Path], Path],
) -> None:
    file = copy_of(bundle) / "decoder.onnx"
    decoder = onnx.load(file, load_external_data=False)
    damage(decoder)
    onnx.save(decoder, file)
    with pytest.raises(EngineError, match=message) as raised:
        _build(file, bundle, "decoder", device)
    assert str(file) in str(raised.value)
    assert "tensorrt_rtx" in str(raised.value) or "manifest" in str(raised.value)


def test_a_file_that_is_no_graph_and_one_without_its_weights_are_refused(
    bundle: Path, device: Device, tmp_path: Path
) -> None:
    (tmp_path / "decoder.onnx").write_bytes(b"not a graph")
    with pytest.raises(EngineError, match=r"cannot read it: .*parse the ONNX model"):
        _build(tmp_path / "decoder.onnx", bundle, "decoder", device)
    (tmp_path / "decoder.onnx").write_bytes((bundle / "decoder.onnx").read_bytes())
    with pytest.raises(EngineError, match=r"cannot read it: .*transformer\.wte\.weight"):
        _build(tmp_path / "decoder.onnx", bundle, "decoder", device)


def _scale(path: Path, dtype: int = TensorProto.FLOAT) -> tuple[Path, list[TensorSpec]]:
    """A graph that multiplies x [batch, 4] by a constant."""
    x, y = (helper.make_tensor_value_info(name, dtype, ["batch", 4]) for name in ("x", "y"))
    weight = helper.make_tensor("w", dtype, [4], np.ones(4))
    graph = helper.make_graph([helper.make_node("Mul", ["x", "w"], ["y"])], "scale", [x], [y], [weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path / "scale.onnx")
    return path / "scale.onnx", [TensorSpec("x", "float32", ("batch", 4))]


@pytest.mark.parametrize("ranges", [Range(2, 1, 4), Range(1, 8, 4), Range(-2, 1, 4)])
def test_tensorrt_would_refuse_wrong_profiles_too(ranges: Range, device: Device, tmp_path: Path) -> None:
    """check_profile stands before this; here is what would happen without it."""
    file, inputs = _scale(tmp_path)
    assert build_engine(TENSORRT, device, file, inputs, [Profile("good", {"batch": Range(1, 2, 4)})], ignore)
    with pytest.raises(ProfileError, match="TensorRT refuses the profile bad: batch"):
        build_engine(TENSORRT, device, file, inputs, [Profile("bad", {"batch": ranges})], ignore)


def test_a_build_that_fails_says_why(device: Device, tmp_path: Path) -> None:
    file, inputs = _scale(tmp_path)
    with pytest.raises(EngineError, match=r"scale\.onnx: tensorrt_rtx .* cannot build an engine from it: .*profile"):
        build_engine(TENSORRT, device, file, inputs, [], ignore)


def test_a_build_that_fails_leaves_nothing_of_tensorrt_in_its_traceback(device: Device, tmp_path: Path) -> None:
    """A builder that waits there for Python's collector can block or end the process when it is collected."""
    file, inputs = _scale(tmp_path)
    with pytest.raises(EngineError) as caught:
        build_engine(TENSORRT, device, file, inputs, [], ignore)
    held = [value for entry in caught.traceback for value in entry.frame.f_locals.values()]
    assert not [value for value in held if type(value).__module__.startswith("tensorrt")]


def test_ctrl_c_ends_a_build(bundle: Path) -> None:
    """In a process of its own, as it is for a user; in one that had built dozens of engines it ended the process."""
    script = """
import signal, sys
from pathlib import Path
from chameleon_deploy.runtime.device import engines
from chameleon_deploy.contract.bundle import open_bundle
from chameleon_deploy.export.tensorrt import build_engine
from chameleon_deploy.runtime.device.profiles import profiles

def interrupt(what, done, total):
    if done > 100:
        signal.raise_signal(signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background ignores it
bundle, tensorrt = Path(sys.argv[1]), engines.import_tensorrt()
manifest = open_bundle(bundle).manifest
graph = manifest.graphs["decoder"]
device = engines.target_device(tensorrt)
try:
    build_engine(tensorrt, device, bundle / graph.file, graph.inputs, profiles(manifest, graph), interrupt)
except KeyboardInterrupt:
    print("interrupted")
"""
    command = [sys.executable, "-c", script, str(bundle)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "interrupted\n"


def test_the_command_writes_a_bundle_and_builds_its_engines(mini_path: Path, tmp_path: Path, cache: Path) -> None:
    out = tmp_path / "b"
    exported = run("chameleon_deploy.export", mini_path, "--out", out, "--no-verify")
    assert exported.returncode == 0, exported.stderr
    result = run("chameleon_deploy.engines", out)
    assert result.returncode == 0, result.stderr
    assert "engines for any (compute capability 8.0" in result.stdout
    assert not [file for file in out.iterdir() if file.suffix == ".engine"]
    (entry,) = [path for path in (cache / "engines").iterdir() if path.is_dir()]
    again = run("chameleon_deploy.engines", out)
    assert again.returncode == 0, again.stderr
    assert str(entry) in again.stdout


def test_a_bundle_is_exported_no_second_time(bundle: Path, tmp_path: Path) -> None:
    result = run("chameleon_deploy.export", bundle, "--out", tmp_path / "again")
    assert result.returncode == 2
    assert "is a bundle already" in result.stderr
    assert result.stderr.count("\n") == 1


def test_one_process_builds_while_the_others_wait(bundle: Path, cache: Path) -> None:
    command: list[Any] = [sys.executable, "-m", "chameleon_deploy.engines", bundle]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert len({output.split(":")[0] for output in outputs}) == 1
    assert len([path for path in (cache / "engines").iterdir() if path.is_dir()]) == 1


def test_a_cache_that_cannot_be_written_is_named(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("CHAMELEON_DEPLOY_CACHE", str(tmp_path / "file"))
    with pytest.raises(OutputError, match="CHAMELEON_DEPLOY_CACHE"):
        build_engines(bundle, ignore)

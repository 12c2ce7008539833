"""A bundle that is not exactly what its manifest says is refused, with the error of that fault."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import chameleon_deploy
from chameleon_deploy import errors
from chameleon_deploy.contract.bundle import factor_names, open_bundle, start_opening
from tests.damage import Damage, edit, reseal

HEAD = {"name": "lm_head", "in_features": 64, "out_features": 512}
A, B = factor_names("lm_head")


def targets(*specs: dict[str, Any]) -> Damage:
    return edit(adaptation__targets=list(specs))


def centroids(change: Callable[[Any], Any], name: str = "centroids") -> Damage:
    def damage(path: Path) -> None:
        file = path / "centroids.safetensors"
        save_file({name: np.ascontiguousarray(change(load_file(file)["centroids"]))}, file)
        reseal(path)

    return damage


def overwrite(name: str, content: bytes, seal: bool = True) -> Damage:
    def damage(path: Path) -> None:
        (path / name).write_bytes(content)
        if seal:
            reseal(path)

    return damage


def truncate(name: str, count: int = 1) -> Damage:
    return lambda path: (path / name).write_bytes((path / name).read_bytes()[:-count])


def flip_a_byte(path: Path) -> None:
    data = bytearray((path / "weights.bin").read_bytes())
    data[len(data) // 2] ^= 1
    (path / "weights.bin").write_bytes(data)


def replace_by_link(path: Path) -> None:
    outside = path.parent / "outside.json"
    (path / "parity.json").rename(outside)
    (path / "parity.json").symlink_to(outside)


def rename_in_manifest(new: str) -> Damage:
    def damage(path: Path) -> None:
        manifest = json.loads((path / "bundle.json").read_text())
        manifest["files"][new] = manifest["files"].pop("parity.json")
        (path / "bundle.json").write_text(json.dumps(manifest))

    return damage


def drop_field(path: Path) -> None:
    manifest = json.loads((path / "bundle.json").read_text())
    del manifest["model"]["hidden_size"]
    (path / "bundle.json").write_text(json.dumps(manifest))


FAULTS: dict[str, tuple[Damage, type[errors.ChameleonError], str]] = {
    "no manifest": (lambda p: (p / "bundle.json").unlink(), errors.BundleNotFoundError, "not a bundle"),
    "empty manifest": (overwrite("bundle.json", b"", False), errors.ManifestError, "bundle.json"),
    "manifest cut off": (truncate("bundle.json", 4), errors.ManifestError, "bundle.json"),
    "not JSON": (overwrite("bundle.json", b"{]", False), errors.ManifestError, "bundle.json"),
    "not an object": (overwrite("bundle.json", b"[1]", False), errors.ManifestError, "format"),
    "not UTF-8": (overwrite("bundle.json", b'{"format": "\xff"}', False), errors.ManifestError, "bundle.json"),
    "deeply nested": (overwrite("bundle.json", b"[" * 100_000, False), errors.ManifestError, "bundle.json"),
    "other format": (edit(format="zip"), errors.ManifestError, "format"),
    "newer version": (edit(format_version=2), errors.VersionError, "format_version 2"),
    "unknown field": (edit(surprise=1), errors.ManifestError, "surprise"),
    "missing field": (drop_field, errors.ManifestError, "hidden_size"),
    "wrong type": (edit(model__hidden_size="64"), errors.ManifestError, "hidden_size"),
    "zero layers": (edit(model__num_layers=0), errors.ManifestError, "num_layers"),
    "negative rank": (edit(adaptation__rank=-1), errors.ManifestError, "rank"),
    "eos outside": (edit(model__eos_token_id=512), errors.ManifestError, "eos_token_id"),
    "unknown precision": (edit(precision="fp13"), errors.ManifestError, "precision"),
    "regime does not fit": (edit(adaptation__regime="lora"), errors.ManifestError, "lora.safetensors"),
    "no targets": (targets(), errors.ManifestError, "at least one layer"),
    "a target twice": (targets(HEAD, HEAD), errors.ManifestError, "each layer once"),
    "a target without features": (
        targets({**HEAD, "in_features": 0}),
        errors.ManifestError,
        "below 1",
    ),
    "a target of other features": (
        targets({**HEAD, "in_features": 63}),
        errors.ManifestError,
        "lm_head is not",
    ),
    "a target that no graph has": (targets({**HEAD, "name": "h"}), errors.ManifestError, "'h.lora_A' is missing"),
    "layers that no graph has": (edit(model__num_layers=3), errors.ManifestError, "past_key_values.2.key' is missing"),
    "another head size": (edit(model__head_dim=8), errors.ManifestError, "not float32 .*, 8]"),
    "another precision": (edit(precision="int8"), errors.ManifestError, "not int8"),
    "beyond 64 bits": (edit(adaptation__max_length=2**63), errors.ManifestError, "max_length"),
    "a field of an older export": (edit(determinism=["F"]), errors.ManifestError, "determinism"),
    "limit zero": (edit(limits__batch=0), errors.ManifestError, "limits.batch must be at least 1"),
    "limit beyond": (edit(limits__sequence=129), errors.ManifestError, "limits.sequence 129 is beyond"),
    "past beyond": (edit(limits__past=128), errors.ManifestError, "limits.past 128 is beyond"),
    "no decoder": (edit(graphs={}), errors.ManifestError, "decoder"),
    "graph file not listed": (edit(graphs__decoder__file="x.onnx"), errors.ManifestError, "x.onnx"),
    "embedding outside": (edit(token_embedding__offset=10**9), errors.ManifestError, "outside weights.bin"),
    "embedding before": (edit(token_embedding__offset=-4), errors.ManifestError, "outside weights.bin"),
    "embedding shape": (edit(token_embedding__shape=[64, 512]), errors.ManifestError, "token_embedding"),
    "parent path": (rename_in_manifest("../parity.json"), errors.PathError, "../parity.json"),
    "absolute path": (rename_in_manifest("/etc/passwd"), errors.PathError, "/etc/passwd"),
    "nested path": (rename_in_manifest("a/b.json"), errors.PathError, "a/b.json"),
    "dot dot": (rename_in_manifest(".."), errors.PathError, "'..'"),
    "symlink out": (replace_by_link, errors.PathError, "symbolic link"),
    "file missing": (lambda p: (p / "parity.json").unlink(), errors.MissingFileError, "parity.json"),
    "file extra": (lambda p: (p / "notes.txt").write_text("x"), errors.UnknownFileError, "notes.txt"),
    "directory extra": (lambda p: (p / "sub").mkdir(), errors.UnknownFileError, "sub"),
    "file truncated": (truncate("weights.bin"), errors.DigestError, "weights.bin"),
    "byte flipped": (flip_a_byte, errors.DigestError, "SHA-256"),
    "centroids NaN": (centroids(lambda c: c * np.nan), errors.TensorError, "NaN"),
    "centroids shape": (centroids(lambda c: c[:, :-1]), errors.TensorError, "centroids is float32"),
    "centroids dtype": (centroids(lambda c: c.astype(np.float64)), errors.TensorError, "float64"),
    "centroids name": (centroids(lambda c: c, "means"), errors.TensorError, "means"),
    "centroids garbage": (overwrite("centroids.safetensors", b"\xff" * 40), errors.TensorError, "centroids"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults(name: str, bundle: Path, copy_of: Callable[[Path], Path]) -> None:
    damage, error, message = FAULTS[name]
    path = copy_of(bundle)
    damage(path)
    with pytest.raises(errors.ChameleonError, match=message) as raised:
        open_bundle(path)
    assert type(raised.value) is error
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("loading_fails", [False, True])
def test_weights_that_differ_are_refused_whatever_was_made_of_them(
    loading_fails: bool, bundle: Path, copy_of: Callable[[Path], Path]
) -> None:
    """Their digest is computed while sessions open: no runtime gets out, and the digest is the error to read."""
    path = copy_of(bundle)
    flip_a_byte(path)
    if loading_fails:
        other_operators(path)
        flip_a_byte(path)
    with pytest.raises(errors.DigestError, match=r"weights\.bin: its SHA-256"):
        chameleon_deploy.load(path)
    with pytest.raises(errors.DigestError, match="SHA-256"):
        start_opening(path).require_weights()


def other_operators(path: Path) -> None:
    """A decoder of known operators that ONNX Runtime refuses: they lack an attribute."""
    graph = path / "decoder_cpu.onnx"
    graph.write_bytes(graph.read_bytes().replace(b"MatMul", b"Concat"))
    reseal(path)


def other_model(path: Path) -> None:
    """A graph whose signature is not the manifest's: the hypernetwork in the decoder's place."""
    (path / "decoder_cpu.onnx").write_bytes((path / "hypernetwork.onnx").read_bytes())
    reseal(path)


def external_data_outside(path: Path) -> None:
    """A decoder whose weights lie outside the bundle."""
    (path.parent / "stolen.bin").write_bytes((path / "weights.bin").read_bytes())
    graph = (path / "decoder_cpu.onnx").read_bytes()
    assert len("../stolen.b") == len("weights.bin")
    (path.parent / "stolen.b").write_bytes((path / "weights.bin").read_bytes())
    (path / "decoder_cpu.onnx").write_bytes(graph.replace(b"weights.bin", b"../stolen.b"))
    reseal(path)


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (overwrite("decoder_cpu.onnx", b"not a graph"), errors.GraphError, "not protobuf"),
        (other_operators, errors.GraphError, "cannot load"),
        (other_model, errors.GraphError, "differ from the manifest"),
        (external_data_outside, errors.GraphError, "does not list"),
        (overwrite("tokenizer.json", b"{}"), errors.ManifestError, "tokenizer.json"),
    ],
)
def test_faults_that_show_when_loading(
    damage: Damage, error: type[errors.ChameleonError], message: str, bundle: Path, copy_of: Callable[[Path], Path]
) -> None:
    path = copy_of(bundle)
    damage(path)
    with pytest.raises(error, match=message):
        chameleon_deploy.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {**t, A: t[A][0]}, "lm_head.lora_A is float32"),
        (lambda t: {**t, B: t[B] * np.float32("inf")}, "lm_head.lora_B holds NaN or infinity"),
        (lambda t: {A: t[A]}, "expected"),
    ],
)
def test_faults_of_a_stored_lora(
    change: Callable[[Any], Any], message: str, lora_bundle: Path, copy_of: Callable[[Path], Path]
) -> None:
    path = copy_of(lora_bundle)
    save_file(change(load_file(path / "lora.safetensors")), path / "lora.safetensors")
    reseal(path)
    with pytest.raises(errors.TensorError, match=message):
        open_bundle(path)


def test_every_error_has_its_own_code() -> None:
    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.ChameleonError)]
    assert len({c.code for c in classes}) == len(classes)


def test_missing_bundle(tmp_path: Path) -> None:
    with pytest.raises(errors.BundleNotFoundError, match="not a directory"):
        open_bundle(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    with pytest.raises(errors.BundleNotFoundError, match="not a directory"):
        open_bundle(tmp_path / "file")


def test_token_embedding_is_mapped_not_read(bundle: Path) -> None:
    table = open_bundle(bundle).token_embedding().stored
    assert isinstance(table, np.memmap)
    assert table.shape == (512, 64)

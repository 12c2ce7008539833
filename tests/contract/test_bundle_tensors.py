"""The tensors of a bundle as they are read: what is accepted at its limits, and what is refused."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from chameleon_deploy.contract import bundle as implementation
from chameleon_deploy.contract.bundle import open_bundle, start_opening
from chameleon_deploy.errors import TensorError
from tests.damage import edit, reseal
from tests.shared_data import good_bundle

GOOD = good_bundle("chameleon_masked")
IN, OUT = 128, 192
Tensors = dict[str, Any]
BASIS: Tensors = {
    "h.in_before": np.ones(IN, np.float32),
    "h.in_block": np.array([64]),
    "h.in_after": np.ones(IN, np.float32),
    "h.out_blocks": np.array([64, 16, 1]),
    "h.out_after": np.ones(OUT, np.float32),
}


@pytest.fixture
def int8_trunk(tmp_path: Path) -> Path:
    """A bundle whose int8 trunk is adapted, as far as its manifest says: no session opens on its graphs."""
    path = tmp_path / "int8_trunk"
    shutil.copytree(GOOD, path)
    manifest = json.loads((path / "bundle.json").read_text())
    manifest["precision"] = "int8"
    manifest["files"]["basis.safetensors"] = {"size": 0, "sha256": ""}
    manifest["adaptation"]["targets"].append({"name": "h", "in_features": IN, "out_features": OUT})
    manifest["graphs"] = {name: manifest["graphs"][name] for name in ("decoder", "hypernetwork")}
    for graph, kind, rank in (("decoder", "inputs", "rank"), ("hypernetwork", "outputs", 2)):
        for name, width in (("h.lora_A", IN), ("h.lora_B", OUT)):
            tensor = {"name": name, "dtype": "float32", "shape": ["factor_sets", rank, width]}
            manifest["graphs"][graph][kind].append(tensor)
    (path / "bundle.json").write_text(json.dumps(manifest))
    return path


def with_basis(path: Path, tensors: Tensors) -> Path:
    save_file(tensors, path / "basis.safetensors")
    reseal(path)
    return path


@pytest.mark.parametrize("name", ["h.in_block", "h.out_blocks"])
@pytest.mark.parametrize("blocks", [[1], [4], [16], [64], [16, 64], [4, 4]])
def test_blocks_that_divide_their_channels(name: str, blocks: list[int], int8_trunk: Path) -> None:
    if name == "h.out_blocks" and blocks == [16, 64]:
        blocks = [1, 16, 1, 4, 1, 16]  # of 32 channels each
    basis = open_bundle(with_basis(int8_trunk, BASIS | {name: np.array(blocks)})).basis()
    assert basis.keys() == BASIS.keys()
    assert basis[name].tolist() == blocks


WRONG_BASIS: dict[str, Callable[[Tensors], Tensors]] = {
    "a missing tensor": lambda basis: {name: basis[name] for name in basis if name != "h.in_after"},
    "another tensor": lambda basis: basis | {"extra": np.ones(3, np.float32)},
    "another length": lambda basis: basis | {"h.in_after": np.ones(OUT, np.float32)},
    "another type": lambda basis: basis | {"h.in_before": np.ones(IN)},
    "NaN": lambda basis: basis | {"h.out_after": np.full(OUT, np.nan, np.float32)},
    "blocks of another type": lambda basis: basis | {"h.in_block": np.array([4], np.int32)},
    "a table of blocks": lambda basis: basis | {"h.in_block": np.array([[4]])},
    "no block": lambda basis: basis | {"h.out_blocks": np.array([], np.int64)},
    "five blocks": lambda basis: basis | {"h.out_blocks": np.array([1] * 5)},
    "unequal parts": lambda basis: basis | {"h.in_block": np.array([1, 1, 1])},
    "a block that does not divide": lambda basis: basis | {"h.out_blocks": np.array([64, 64])},
} | {
    f"a block of {size}": lambda basis, size=size: basis | {"h.in_block": np.array([size])}
    for size in (-1, 0, 2, 5, 8, 17, 32, 65, 128)
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_BASIS)
def test_a_wrong_basis(name: str, int8_trunk: Path) -> None:
    with_basis(int8_trunk, WRONG_BASIS[name](BASIS))
    with pytest.raises(TensorError, match=r"basis\.safetensors: "):
        open_bundle(int8_trunk)


def test_a_bundle_without_clusters_has_no_centroids(tmp_path: Path) -> None:
    path = tmp_path / "bundle"
    shutil.copytree(GOOD, path)
    (path / "centroids.safetensors").unlink()
    manifest = json.loads((path / "bundle.json").read_text())
    del manifest["files"]["centroids.safetensors"]
    edit(files=manifest["files"], adaptation__num_clusters=0)(path)
    assert open_bundle(path).centroids().shape == (0, 16)
    assert open_bundle(GOOD).centroids().shape == (3, 16)


def test_a_token_embedding_of_int8_rows(tmp_path: Path) -> None:
    path = tmp_path / "bundle"
    shutil.copytree(GOOD, path)
    rows = np.arange(320 * 16).astype(np.int8).reshape(320, 16)
    scales, channels = np.arange(320, dtype=np.float32), np.arange(16, dtype=np.float32)
    places = {"offset": 8, "row_scales_offset": 8 + rows.nbytes,
              "channel_scales_offset": 8 + rows.nbytes + scales.nbytes}  # fmt: skip
    weights = (path / "weights.bin").read_bytes()
    written = bytes(8) + rows.tobytes() + scales.tobytes() + channels.tobytes()
    (path / "weights.bin").write_bytes(written + weights[len(written) :])
    edit(token_embedding={"file": "weights.bin", "dtype": "int8", "shape": [320, 16], "rotation": 4, **places})(path)
    reseal(path)
    found = open_bundle(path).token_embedding()
    assert found.stored.tolist() == rows.tolist()
    assert found.int8 is not None
    assert (found.int8.rows.tolist(), found.int8.channels.tolist()) == (scales.tolist(), channels.tolist())
    assert found.int8.rotation == 4
    assert open_bundle(GOOD).token_embedding().int8 is None


def test_weights_are_hashed_in_the_background(monkeypatch: pytest.MonkeyPatch) -> None:
    """`start_opening` returns while the digest of the weights is being computed; `require_weights` waits for it."""
    go, sha256 = threading.Event(), implementation.file_sha256

    def slowly(file: Path) -> str:
        if file.name == "weights.bin":
            go.wait(20)  # a caller that waited would make the next line fail
        return sha256(file)

    monkeypatch.setattr(implementation, "file_sha256", slowly)
    bundle = start_opening(GOOD)
    assert not bundle.weights_checked.done()
    go.set()
    bundle.require_weights()
    assert bundle.weights_checked.done()

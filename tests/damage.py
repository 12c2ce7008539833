"""Damaged bundles: change the manifest, or make the digests of changed files right again."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Damage = Callable[[Path], object]


def changed(content: Any, **changes: Any) -> Any:
    """Return a copy of JSON after changes; a name with __ reaches into nested objects."""
    content = copy.deepcopy(content)
    for name, value in changes.items():
        *parents, last = name.split("__")
        place = content
        for parent in parents:
            place = place[parent]
        place[last] = value
    return content


def edit(**changes: Any) -> Damage:
    """Change manifest fields, see `changed`."""

    def damage(path: Path) -> None:
        manifest = changed(json.loads((path / "bundle.json").read_text()), **changes)
        (path / "bundle.json").write_text(json.dumps(manifest))

    return damage


def reseal(path: Path) -> None:
    """Make size and digest of every file right again: what remains wrong is the content."""
    manifest = json.loads((path / "bundle.json").read_text())
    for name in manifest["files"]:
        data = (path / name).read_bytes()
        manifest["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (path / "bundle.json").write_text(json.dumps(manifest))


def change_weights(name: str, change: Callable[[Any], Any]) -> Damage:
    """Change one tensor of weights.bin, found through the graph that refers to it."""

    def damage(path: Path) -> None:
        import numpy as np
        import onnx

        for graph in ("decoder.onnx", "hypernetwork.onnx"):
            for initializer in onnx.load(path / graph, load_external_data=False).graph.initializer:
                if initializer.name != name:
                    continue
                place = {entry.key: entry.value for entry in initializer.external_data}
                values = np.memmap(
                    path / "weights.bin", np.float32, "r+", int(place["offset"]), tuple(initializer.dims)
                )
                values[:] = change(np.array(values))
                values.flush()
                reseal(path)
                return
        raise AssertionError(f"no initializer {name}")

    return damage

"""Damaged bundles: change the manifest, or make the digests of changed files right again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Damage = Callable[[Path], object]


def edit(**changes: Any) -> Damage:
    """Change manifest fields; a dotted name with __ reaches into nested objects."""

    def damage(path: Path) -> None:
        manifest = json.loads((path / "bundle.json").read_text())
        for name, value in changes.items():
            *parents, last = name.split("__")
            target = manifest
            for parent in parents:
                target = target[parent]
            target[last] = value
        (path / "bundle.json").write_text(json.dumps(manifest))

    return damage


def reseal(path: Path) -> None:
    """Make size and digest of every file right again: what remains wrong is the content."""
    manifest = json.loads((path / "bundle.json").read_text())
    for name in manifest["files"]:
        data = (path / name).read_bytes()
        manifest["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (path / "bundle.json").write_text(json.dumps(manifest))

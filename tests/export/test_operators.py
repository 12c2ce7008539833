"""The operators that runtimes take are those that export writes, and no others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import onnx

from chameleon_deploy.contract.bundle import Precision
from chameleon_deploy.contract.onnx_operators import OPERATORS
from chameleon_deploy.export.exporter import export_bundle
from chameleon_deploy.reference.checkpoint import Checkpoint
from chameleon_deploy.reference.model import trunk_from
from tests.conftest import Exported
from tests.families import small_model


def test_the_list_is_what_export_writes(exported: Exported, llama: Checkpoint, tmp_path: Path) -> None:
    """For every precision, of families that have every operator."""
    written: dict[str, set[str]] = {}
    gemma = replace(llama, trunk=trunk_from(small_model("gemma2"), llama.trunk.tokenizer))
    for precision in get_args(Precision):
        export_bundle(gemma, tmp_path / precision, precision=precision)
        for bundle in (tmp_path / precision, exported("mini", precision), exported("llama", precision)):
            for file in bundle.glob("*.onnx"):
                for node in _nodes(onnx.load(file, load_external_data=False).graph):
                    written.setdefault(node.domain, set()).add(node.op_type)
    assert written == OPERATORS


def _nodes(graph: Any) -> Iterator[Any]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _nodes(attribute.g)

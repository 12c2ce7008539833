"""The bundle with LoRA removed from its graphs: what adaptation costs."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

import chameleon_deploy
from chameleon_deploy.bench.peers.bundle import Bundle
from chameleon_deploy.bundle import MANIFEST
from chameleon_deploy.bundle import Bundle as BundleFiles
from chameleon_deploy.runtime import Runtime


class WithoutLoRA(Bundle):
    """See `Peer`. The same engine on the same weights, in mode none."""

    def __init__(self, runtime: Runtime, threads: int, directory: Path) -> None:
        """Write the changed bundle into `directory` and load it.

        Raises ValueError when the bundle runs elsewhere than on the CPU or its graph's update is not a sum.
        """
        if runtime.provider != "cpu":
            raise ValueError(f"not done for provider {runtime.provider!r}")
        write_without_lora(runtime.bundle, directory)
        super().__init__(chameleon_deploy.load(directory, mode="none", threads=threads), "without LoRA")


def write_without_lora(bundle: BundleFiles, directory: Path) -> None:
    """Write a copy of a bundle, hard links where possible, whose graphs ignore the factors.

    Raises ValueError for a graph whose update is not a sum.
    """
    shutil.copytree(bundle.path, directory, copy_function=_link)
    manifest = json.loads((directory / MANIFEST).read_text())
    for spec in bundle.manifest.graphs.values():
        if "cpu" not in spec.providers or not any(_is_factor(tensor.name) for tensor in spec.inputs):
            continue
        model = ir.load(bundle.path / spec.file)
        remove_lora(model.graph)
        content = ir.to_proto(model).SerializeToString()
        _replace(directory / spec.file, content)
        manifest["files"][spec.file] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    _replace(directory / MANIFEST, json.dumps(manifest).encode())


def remove_lora(graph: ir.Graph) -> None:
    """Replace every base + update by base, in place. The inputs stay, unused.

    Raises ValueError when no node adds what lora_B gives to something else.
    """
    found = False
    adapted = {value for value in graph.inputs if _is_factor(str(value.name))}
    from_b = {value for value in adapted if str(value.name).endswith("lora_B")}
    for node in graph:
        inputs = [value for value in node.inputs if value is not None]
        plain = [value for value in inputs if value not in adapted and not value.is_initializer()]
        if from_b.intersection(inputs) and node.op_type in ("Add", "Gemm") and plain:
            (base,) = plain
            ir.convenience.replace_all_uses_with(node.outputs[0], base, replace_graph_outputs=True)
            # Where the sum was the graph's output, the manifest tells its name and shape.
            base.name, base.shape = node.outputs[0].name, node.outputs[0].shape
            found = True
            continue
        if adapted.intersection(inputs):
            adapted.update(node.outputs)
        if from_b.intersection(inputs):
            from_b.update(node.outputs)
    if not found:
        raise ValueError("the graph has no sum of logits and update")
    RemoveUnusedNodesPass()(ir.Model(graph, ir_version=10))


def _is_factor(name: str) -> bool:
    return name == "factor_ids" or name.endswith(("lora_A", "lora_B"))


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)


def _replace(file: Path, content: bytes) -> None:
    file.unlink()  # a hard link: writing into it would change the original
    file.write_bytes(content)

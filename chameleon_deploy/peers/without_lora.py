"""The bundle's own engine and graph with everything taken out that adapts."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from chameleon_deploy.peers.bundle import Bundle
from chameleon_deploy.runtime import Runtime
from chameleon_deploy.runtime.session import import_onnxruntime


class WithoutLoRA(Bundle):
    """See `Peer`. What adaptation costs: neither clustering's factors nor a trace of LoRA in the graph."""

    adapts = False

    def __init__(self, runtime: Runtime) -> None:
        """Raises ValueError when the graph's update is not a sum or runs elsewhere than on the CPU."""
        if runtime.provider != "cpu":
            raise ValueError(f"not done for provider {runtime.provider!r}")
        model = ir.load(runtime.bundle.path / runtime.manifest.graphs[runtime.graph].file)
        remove_lora(model.graph)
        plain = copy.copy(runtime)
        plain.mode = "none"
        decoder: Any = copy.copy(runtime.decoder)
        decoder.session = _session(model, decoder.session.get_session_options(), runtime.bundle.path)
        plain.decoder = decoder
        super().__init__(plain, "without LoRA")


def remove_lora(graph: ir.Graph) -> None:
    """Replace base + update by base, in place. The inputs stay, and nothing reads them.

    Raises ValueError when no node adds what lora_B gives to something else.
    """
    values = {value.name: value for value in graph.inputs}
    adapted = {values["lora_A"], values["lora_B"], values["cluster_ids"]}
    from_b = {values["lora_B"]}
    for node in graph:
        inputs = [value for value in node.inputs if value is not None]
        plain = [value for value in inputs if value not in adapted and not value.is_initializer()]
        if from_b.intersection(inputs) and node.op_type in ("Add", "Gemm") and plain:
            (base,) = plain
            ir.convenience.replace_all_uses_with(node.outputs[0], base, replace_graph_outputs=True)
            base.name = node.outputs[0].name  # "logits", where the sum was the graph's output
            RemoveUnusedNodesPass()(ir.Model(graph, ir_version=10))
            return
        if adapted.intersection(inputs):
            adapted.update(node.outputs)
        if from_b.intersection(inputs):
            from_b.update(node.outputs)
    raise ValueError("the graph has no sum of logits and update")


def _session(model: ir.Model, options: Any, weights: Path) -> Any:
    """A session of a graph in memory, its external data in the directory `weights`."""
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(weights))
    return import_onnxruntime().InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )

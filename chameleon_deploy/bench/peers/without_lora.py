"""The bundle with LoRA removed from its graphs, which shows the cost of adaptation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from chameleon_deploy.bench.peers.bundle import Bundle
from chameleon_deploy.contract.bundle import Role
from chameleon_deploy.runtime import Runtime
from chameleon_deploy.runtime.backend import CpuBackend
from chameleon_deploy.runtime.decode.session import import_onnxruntime


class WithoutLoRA(Bundle):
    """The same engine on the same weights, in mode none. See `Peer`."""

    is_ablation = True

    def __init__(self, runtime: Runtime) -> None:
        """Remove the updates. Raises ValueError if the bundle does not run on the CPU or its graph's update is not a
        sum.
        """
        backend = runtime.backend
        if not isinstance(backend, CpuBackend):
            raise ValueError(f"not done for provider {runtime.provider!r}")
        bundle = runtime.bundle
        names: dict[Role, str] = {"decoder": runtime.graph}
        if "hidden_scorer" in backend.sessions:
            names["hidden_scorer"] = bundle.graph("hidden_scorer", "cpu")
        graphs = {role: bundle.manifest.graphs[name] for role, name in names.items()}
        sessions = dict(backend.sessions)
        for role, spec in graphs.items():
            if any(".lora_" in tensor.name for tensor in spec.inputs):  # the scorer has an update of the head alone
                sessions[role] = _session(bundle.path / spec.file, backend.sessions[role])
        super().__init__(Runtime(bundle, CpuBackend(bundle, runtime.graph, sessions), "none"), "without LoRA")


def remove_lora(graph: ir.Graph) -> None:
    """Replace every base + update by base, in place. The inputs stay, unused.

    Raises ValueError if no node adds the product with a B to something else.
    """
    found = False
    values = {value.name: value for value in graph.inputs}
    ids = ("factor_ids", "column_ids")
    adapted = {value for name, value in values.items() if name in ids or ".lora_" in str(name)}
    from_b = {value for name, value in values.items() if str(name).endswith(".lora_B")}
    for node in graph:
        branches = [each.as_graph() for each in node.attributes.values() if each.type is ir.AttributeType.GRAPH]
        nodes = [node, *(inner for branch in branches for inner in ir.traversal.RecursiveGraphIterator(branch))]
        inputs = [value for each in nodes for value in each.inputs if value is not None]
        plain = [value for value in inputs if value not in adapted and not value.is_initializer()]
        if from_b.intersection(inputs) and node.op_type in ("Add", "Gemm") and plain:
            (base,) = plain
            ir.convenience.replace_all_uses_with(node.outputs[0], base, replace_graph_outputs=True)
            base.name = node.outputs[0].name  # "logits", if the sum was the graph's output
            found = True
            continue
        if adapted.intersection(inputs):
            adapted.update(node.outputs)
        if from_b.intersection(inputs):
            from_b.update(node.outputs)
    if not found:
        raise ValueError("the graph has no sum of logits and update")
    RemoveUnusedNodesPass()(ir.Model(graph, ir_version=10))


def _session(file: Path, like: Any) -> Any:
    """Open a graph without the update, with the options of another session."""
    model = ir.load(file)
    remove_lora(model.graph)
    options = like.get_session_options()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(file.parent))
    return import_onnxruntime().InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )

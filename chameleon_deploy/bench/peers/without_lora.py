"""The bundle's own engine and graph with everything taken out that adapts."""

from __future__ import annotations

import copy
from typing import Any, cast

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from chameleon_deploy.bench.peers.bundle import Bundle
from chameleon_deploy.bundle import Bundle as BundleFiles
from chameleon_deploy.runtime import Runtime
from chameleon_deploy.runtime.session import import_onnxruntime
from chameleon_deploy.runtime.shared_cache import SharedCacheDecoder
from chameleon_deploy.runtime.tiled_scorer import TiledScorer


class WithoutLoRA(Bundle):
    """See `Peer`. What adaptation costs: neither clustering's factors nor a trace of LoRA in the graph."""

    adapts = False

    def __init__(self, runtime: Runtime) -> None:
        """Raises ValueError when the graph's update is not a sum or runs elsewhere than on the CPU."""
        if runtime.provider != "cpu":
            raise ValueError(f"not done for provider {runtime.provider!r}")
        plain, decoder = copy.copy(runtime), cast(Any, copy.copy(runtime.decoder))
        plain.mode, plain.decoder = "none", decoder
        decoder.session = _session(runtime.bundle, runtime.graph, decoder.session)
        if isinstance(decoder, SharedCacheDecoder):
            scorer = runtime.bundle.graph("hidden_scorer", "cpu")
            decoder.scorer = TiledScorer(_session(runtime.bundle, scorer, decoder.scorer.session))
        super().__init__(plain, "without LoRA")


def remove_lora(graph: ir.Graph) -> None:
    """Replace every base + update by base, in place. The inputs stay, and nothing reads them.

    Raises ValueError when no node adds what lora_B gives to something else.
    """
    found = False
    values = {value.name: value for value in graph.inputs}
    adapted = {values["lm_head.lora_A"], values["lm_head.lora_B"], values["factor_ids"]}
    from_b = {values["lm_head.lora_B"]}
    for node in graph:
        inputs = [value for value in node.inputs if value is not None]
        plain = [value for value in inputs if value not in adapted and not value.is_initializer()]
        if from_b.intersection(inputs) and node.op_type in ("Add", "Gemm") and plain:
            (base,) = plain
            ir.convenience.replace_all_uses_with(node.outputs[0], base, replace_graph_outputs=True)
            base.name = node.outputs[0].name  # "logits", where the sum was the graph's output
            found = True
            continue
        if adapted.intersection(inputs):
            adapted.update(node.outputs)
        if from_b.intersection(inputs):
            from_b.update(node.outputs)
    if not found:
        raise ValueError("the graph has no sum of logits and update")
    RemoveUnusedNodesPass()(ir.Model(graph, ir_version=10))


def _session(bundle: BundleFiles, graph: str, like: Any) -> Any:
    """A session of one of a bundle's graphs with the update taken out, with the options of another session."""
    model = ir.load(bundle.path / bundle.manifest.graphs[graph].file)
    remove_lora(model.graph)
    options = like.get_session_options()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(bundle.path))
    return import_onnxruntime().InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )

"""The bundle: as users run it, and used otherwise, which shows what adapting in one mixed call costs and saves."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from chameleon_deploy.peers import DECODE, ONE_CALL_PER_CLUSTER, PREFILL, Lap, Rows
from chameleon_deploy.runtime import Adaptation, Runtime, Sampling
from chameleon_deploy.runtime.generation import Row, stream_tokens
from chameleon_deploy.runtime.session import import_onnxruntime


class Bundle:
    """See `Peer`. Rows of all clusters in one call."""

    adapts = True

    def __init__(self, runtime: Runtime, name: str = "bundle") -> None:
        self.name = name
        self.precision: str = runtime.manifest.precision
        self._runtime = runtime
        # Every generation is to have the same length, so no token ends one.
        self._endless = msgspec.structs.replace(runtime.manifest.model, eos_token_id=-1)

    def score(self, rows: Rows) -> Any:
        return np.array([score.token_logprobs for score in self._runtime.score(rows)])

    def generate(self, rows: Rows, num_tokens: int, lap: Lap) -> Any:
        return self._generate(rows, self._adapt(rows), num_tokens, lap)

    def _adapt(self, rows: Rows) -> Adaptation:
        return self._runtime._adapt([list(ids) for ids in rows], None, None, None)  # which leaves factors on a device

    def _generate(self, rows: Rows, adaptation: Adaptation, num_tokens: int, lap: Lap) -> Any:
        """The loop of `Runtime.stream`."""
        active = [Row(ids, num_tokens, Sampling(), i, -1) for i, ids in enumerate(rows)]
        tokens = stream_tokens(active, self._runtime.decoder, adaptation, self._runtime.tokenizer, self._endless)
        for _ in rows:
            next(tokens)
        lap(PREFILL)
        for _ in tokens:
            pass
        lap(DECODE)
        return np.array([row.token_ids for row in active])


class OneCallPerCluster(Bundle):
    """See `Peer`. As the paper does it: the rows of each cluster apart, with that cluster's factors alone."""

    def __init__(self, runtime: Runtime) -> None:
        super().__init__(runtime, ONE_CALL_PER_CLUSTER)

    def generate(self, rows: Rows, num_tokens: int, lap: Lap) -> Any:
        adaptation = self._adapt(rows)
        chosen = np.empty((len(rows), num_tokens), np.int64)
        for i in range(len(adaptation.lora_A)):
            members = np.flatnonzero(adaptation.factor_ids == i)
            own = replace(
                adaptation.rows(members),
                lora_A=adaptation.lora_A[i : i + 1],
                lora_B=adaptation.lora_B[i : i + 1],
                factor_ids=np.zeros(len(members), np.int64),
            )
            chosen[members] = self._generate([rows[int(row)] for row in members], own, num_tokens, lap)
        return chosen


class WithoutLoRA(Bundle):
    """See `Peer`. The same engine and graph with everything taken out that adapts: what adaptation costs."""

    adapts = False

    def __init__(self, runtime: Runtime, threads: int) -> None:
        """Raises ValueError when the graph's update is not a sum or runs elsewhere than on the CPU."""
        if runtime.provider != "cpu":
            raise ValueError(f"not done for provider {runtime.provider!r}")
        spec = runtime.manifest.graphs[runtime.graph]
        model = ir.load(runtime.bundle.path / spec.file)
        remove_lora(model.graph)
        plain = copy.copy(runtime)
        plain.mode = "none"
        plain.decoder = type(runtime.decoder)(_session(model, runtime, threads), import_onnxruntime().OrtValue,
                                              runtime.manifest.model)  # type: ignore[call-arg]  # fmt: skip
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
            ir.convenience.replace_all_uses_with(node.outputs[0], base)
            RemoveUnusedNodesPass()(ir.Model(graph, ir_version=10))
            return
        if adapted.intersection(inputs):
            adapted.update(node.outputs)
        if from_b.intersection(inputs):
            from_b.update(node.outputs)
    raise ValueError("the graph has no sum of logits and update")


def _session(model: ir.Model, runtime: Runtime, threads: int) -> Any:
    onnxruntime = import_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.enable_mem_pattern, options.intra_op_num_threads = 3, False, threads
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(runtime.bundle.path))
    return onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options, ["CPUExecutionProvider"])

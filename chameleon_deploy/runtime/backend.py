"""Backends: a decoder and the hypernetwork, whose outputs the decoder reads without a copy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from chameleon_deploy.contract.bundle import Bundle, FloatArray, LimitsSpec, Role
from chameleon_deploy.runtime.decode.decoder import StaticDecoder
from chameleon_deploy.runtime.decode.growing_cache import GrowingCacheDecoder
from chameleon_deploy.runtime.decode.session import IntegerWeights, import_onnxruntime, integer_weights, run
from chameleon_deploy.runtime.decode.shared_cache import SharedCacheDecoder
from chameleon_deploy.runtime.decode.tiled_scorer import TiledScorer
from chameleon_deploy.runtime.device.cuda import CudaDevice, DeviceArray
from chameleon_deploy.runtime.device.graph import DeviceGraph
from chameleon_deploy.runtime.device.slot_cache import SlotCacheDecoder
from chameleon_deploy.runtime.factors import FactorSets
from chameleon_deploy.runtime.machine import usable_cores


class Backend(Protocol):
    """The opened graphs of a bundle on one provider, made by `open_backend`.

    provider         "cpu", "cuda" or "tensorrt"
    graph            the name of the decoder's graph in the manifest
    integer_weights  of its integer products, see `session.exact_weights`; None if it has none
    """

    provider: str
    graph: str
    integer_weights: IntegerWeights | None

    @property
    def decoder(self) -> SharedCacheDecoder | StaticDecoder: ...

    def generate_factors(self, conditioning: FloatArray) -> FactorSets:
        """Run the hypernetwork: conditioning float32 [factor_sets, hidden] to as many sets, in the decoder's memory."""

    def place(self, sets: FactorSets) -> FactorSets:
        """Move sets to the memory that the decoder reads. Sets that are there already are returned unchanged."""


class CpuBackend:
    """ONNX Runtime on the CPU. See `Backend`.

    sessions  by role
    """

    provider = "cpu"

    def __init__(self, bundle: Bundle, graph: str, sessions: Mapping[Role, Any]) -> None:
        """Take sessions of the decoder graph `graph`, of the hidden_scorer if that graph has a shared cache, and of
        the hypernetwork if the regime has one.
        """
        self.graph, self.sessions = graph, sessions
        self.integer_weights = integer_weights(bundle, bundle.manifest.graphs[graph])
        session, ort_value = sessions["decoder"], import_onnxruntime().OrtValue
        self.decoder: SharedCacheDecoder | StaticDecoder
        if bundle.manifest.graphs[graph].cache == "shared":
            scorer = TiledScorer(sessions["hidden_scorer"])
            self.decoder = SharedCacheDecoder(session, scorer, ort_value, bundle.manifest)
        else:
            threads = session.get_session_options().intra_op_num_threads or usable_cores()
            self.decoder = GrowingCacheDecoder(session, ort_value, bundle.manifest.model, threads)

    def generate_factors(self, conditioning: FloatArray) -> FactorSets:
        session = self.sessions["hypernetwork"]
        names = [node.name for node in session.get_outputs()]
        values = run(session.run, names, {"conditioning": conditioning})
        return FactorSets(dict(zip(names, values, strict=True)))

    def place(self, sets: FactorSets) -> FactorSets:
        return sets


class DeviceBackend:
    """Graphs on one device, executed by any engine. See `Backend`.

    device  counts the bytes that are copied
    """

    integer_weights: IntegerWeights | None = None

    def __init__(
        self,
        provider: str,
        device: CudaDevice,
        bundle: Bundle,
        graphs: Mapping[Role, DeviceGraph],
        limits: LimitsSpec | None = None,
    ) -> None:
        """Take the graphs of a bundle.

        graphs  by role, without a hypernetwork for regime lora
        limits  of engines with fixed profiles; None if any shape runs
        """
        self.provider, self.device, self._graphs = provider, device, graphs
        decoder = graphs["decoder"]
        self.graph = next(name for name, spec in bundle.manifest.graphs.items() if spec.file == decoder.spec.file)
        self.decoder = SlotCacheDecoder(
            device, decoder, graphs["chooser"], graphs["logits_scorer"], bundle.manifest.model, limits
        )
        self._dtypes = {spec.name: spec.dtype for spec in decoder.spec.inputs}

    def generate_factors(self, conditioning: FloatArray) -> FactorSets:
        hypernetwork = self._graphs["hypernetwork"]
        with self.device.lock:
            outputs = {
                spec.name: self.device.empty(
                    (len(conditioning), *(size for size in spec.shape if isinstance(size, int))), spec.dtype
                )
                for spec in hypernetwork.spec.outputs
            }
            inputs = {"conditioning": self.device.upload(conditioning, "float32")}
            hypernetwork.bind(inputs | outputs).run()
        return FactorSets(outputs)

    def place(self, sets: FactorSets) -> FactorSets:
        with self.device.lock:
            return FactorSets(
                {
                    name: array
                    if isinstance(array, DeviceArray)
                    else self.device.upload(np.asarray(array), self._dtypes[name])
                    for name, array in sets.tensors.items()
                }
            )

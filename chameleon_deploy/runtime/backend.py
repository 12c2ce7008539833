"""What a runtime runs on: a decoder, and the hypernetwork whose outputs the decoder reads where they are."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Protocol, cast

from chameleon_deploy.bundle import Bundle, FloatArray, LimitsSpec, Role
from chameleon_deploy.runtime.adaptation import Factors
from chameleon_deploy.runtime.decoder import Decoder
from chameleon_deploy.runtime.device.cuda import CudaDevice
from chameleon_deploy.runtime.device.graph import DeviceGraph
from chameleon_deploy.runtime.device.slot_cache import SlotCacheDecoder
from chameleon_deploy.runtime.growing_cache import GrowingCacheDecoder
from chameleon_deploy.runtime.session import import_onnxruntime, open_session
from chameleon_deploy.runtime.shared_cache import SharedCacheDecoder
from chameleon_deploy.runtime.tiled_scorer import TiledScorer


class Backend(Protocol):
    """graph: the name of the decoder's graph in the manifest."""

    graph: str
    decoder: Decoder

    def generate_factors(self, conditioning: FloatArray) -> Factors:
        """conditioning [clusters, hidden] -> lora_A [clusters, rank, hidden], lora_B [clusters, rank, vocab]

        On a device they stay there: each is a DeviceArray, which takes the same indices as a numpy array.
        """

    def place(self, factors: Factors) -> Factors:
        """Factors of the host where the decoder reads them."""


class CpuBackend:
    """ONNX Runtime on the CPU. See `Backend`."""

    def __init__(self, bundle: Bundle, threads: int | None, graph: str | None, share_weights: bool) -> None:
        """graph: which of the decoder graphs, where it is not to be the provider's own. share_weights: see `load`."""
        graphs = bundle.manifest.graphs
        self.graph = graph or bundle.graph("decoder", "cpu")
        session = open_session(bundle, graphs[self.graph], threads, share_weights=share_weights)
        ort_value, model = import_onnxruntime().OrtValue, bundle.manifest.model
        self.decoder: Decoder
        if graphs[self.graph].cache == "shared":
            scorer = open_session(bundle, graphs[bundle.graph("hidden_scorer", "cpu")], threads)
            self.decoder = SharedCacheDecoder(session, TiledScorer(scorer), ort_value, bundle.manifest)
        else:
            self.decoder = GrowingCacheDecoder(session, ort_value, model, threads or len(os.sched_getaffinity(0)))
        self._hypernetwork: Any = None
        if bundle.manifest.adaptation.regime == "chameleon":
            name = bundle.graph("hypernetwork", "cpu")
            self._hypernetwork = open_session(bundle, graphs[name], threads, share_weights=share_weights)

    def generate_factors(self, conditioning: FloatArray) -> Factors:
        lora_A, lora_B = self._hypernetwork.run(["lm_head.lora_A", "lm_head.lora_B"], {"conditioning": conditioning})
        return lora_A, lora_B

    def place(self, factors: Factors) -> Factors:
        return factors


class DeviceBackend:
    """Graphs on one device, whoever executes them. See `Backend`.

    device  counts the bytes that cross
    """

    def __init__(
        self, device: CudaDevice, bundle: Bundle, graphs: Mapping[Role, DeviceGraph], limits: LimitsSpec | None
    ) -> None:
        """graphs: by role, without a hypernetwork for regime lora. limits: of engines; None where any shape runs."""
        self.device, self._graphs = device, graphs
        self.graph = next(
            name for name, spec in bundle.manifest.graphs.items() if spec.file == graphs["decoder"].spec.file
        )
        decoder = SlotCacheDecoder(
            device, graphs["decoder"], graphs["chooser"], graphs["logits_scorer"], bundle.manifest.model, limits
        )
        self.decoder: Decoder = decoder
        self._place = decoder.place

    def generate_factors(self, conditioning: FloatArray) -> Factors:
        hypernetwork, sets = self._graphs["hypernetwork"], len(conditioning)
        with self.device.lock:
            tensors = {
                spec.name: self.device.empty((sets, *cast(tuple[int, ...], spec.shape[1:])), spec.dtype)
                for spec in hypernetwork.spec.outputs
            }
            tensors["conditioning"] = self.device.upload(conditioning, "float32")
            hypernetwork.bind(tensors).run()
        return cast(Factors, (tensors["lm_head.lora_A"], tensors["lm_head.lora_B"]))

    def place(self, factors: Factors) -> Factors:
        with self.device.lock:
            return cast(Factors, self._place(factors))

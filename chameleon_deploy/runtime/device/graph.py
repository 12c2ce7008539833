"""A graph whose inputs and outputs are bound to device memory, executed by any engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from chameleon_deploy.contract.bundle import GraphSpec
from chameleon_deploy.errors import DeviceError, GraphError
from chameleon_deploy.runtime.device.cuda import DeviceArray


class Bound(Protocol):
    """A graph with all of its tensors bound."""

    def run(self) -> None:
        """Enqueue the graph on the device's stream. Hold the device's lock."""


class DeviceGraph(Protocol):
    """A graph that can be bound to tensors on the device."""

    spec: GraphSpec

    def bind(self, tensors: Mapping[str, DeviceArray]) -> Bound:
        """Bind every input and output by name.

        Raises GraphError if a dtype or a number of dimensions differs from the graph's.
        """


class SessionGraph:
    """A graph executed by ONNX Runtime through IO binding."""

    def __init__(self, session: Any, spec: GraphSpec, device_type: str) -> None:
        """Take a session.

        device_type  ONNX Runtime's name of the memory that the addresses are in
        """
        self.spec = spec
        self._session, self._device_type = session, device_type

    def bind(self, tensors: Mapping[str, DeviceArray]) -> Bound:
        check_tensors(self.spec, tensors)
        binding = self._session.io_binding()
        for specs, bind in ((self.spec.inputs, binding.bind_input), (self.spec.outputs, binding.bind_output)):
            for spec in specs:
                array = tensors[spec.name]
                bind(spec.name, self._device_type, 0, _element_type(spec.dtype), array.shape, array.address)
        return _BoundSession(self._session, binding, tensors)


class _BoundSession:
    def __init__(self, session: Any, binding: Any, tensors: Mapping[str, DeviceArray]) -> None:
        self._session, self._binding = session, binding
        self._tensors = tensors  # kept alive as long as the addresses are bound

    def run(self) -> None:
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:  # onnxruntime raises several unrelated types
            raise DeviceError(f"ONNX Runtime: {' '.join(str(error).split())[:300]}") from error


def check_tensors(spec: GraphSpec, tensors: Mapping[str, DeviceArray]) -> None:
    """Raise GraphError unless each tensor has the graph's dtype and fixed dimensions, which an address does not
    carry.
    """
    for tensor in (*spec.inputs, *spec.outputs):
        array = tensors[tensor.name]
        fits = len(array.shape) == len(tensor.shape) and all(
            isinstance(wanted, str) or wanted == given for wanted, given in zip(tensor.shape, array.shape, strict=True)
        )
        if array.dtype != tensor.dtype or not fits:
            raise GraphError(
                f"{spec.file}: {tensor.name} is {tensor.dtype} {tensor.shape}, it was given {array.dtype} {array.shape}"
            )


def _element_type(dtype: str) -> Any:
    return 16 if dtype == "bfloat16" else np.dtype(dtype).type  # 16: onnx.TensorProto.BFLOAT16, unknown to numpy

"""A graph executed by a native TensorRT engine: addresses bound, enqueued on the device's stream, replayed.

The objects are those of NVIDIA's Python API, for both TensorRT and TensorRT for RTX
(https://docs.nvidia.com/deeplearning/tensorrt/latest/_static/python-api/).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from chameleon_deploy.contract.bundle import Bundle, GraphSpec, Role
from chameleon_deploy.errors import DeviceError, GraphError, InputError, ProviderError
from chameleon_deploy.runtime.device import engines
from chameleon_deploy.runtime.device.cuda import CudaDevice, DeviceArray
from chameleon_deploy.runtime.device.graph import Bound, DeviceGraph, check_tensors


@engines.released_on_error
def open_engines(bundle: Bundle, device: CudaDevice, names: Mapping[Role, str]) -> dict[Role, DeviceGraph]:
    """Open the engines that `engines` built on this machine.

    names  of the graphs, by role

    Raises DependencyError or ProviderError if TensorRT or the engines are missing.
    """
    tensorrt = engines.import_tensorrt()
    directory = engines.find_engines(bundle, tensorrt, engines.current_device())  # with checked digests
    logger = engines.make_logger(tensorrt)
    runtime = engines.create_runtime(tensorrt, logger)
    graphs: dict[Role, DeviceGraph] = {}
    for role, name in names.items():
        file = directory / engines.engine_file(name)
        engine = runtime.deserialize_cuda_engine(file.read_bytes())
        if engine is None:
            raise ProviderError(
                f"{file}: TensorRT cannot read it: {'; '.join(logger.errors)}: delete it and build again"
            )
        graphs[role] = EngineGraph(tensorrt, engine, bundle.manifest.graphs[name], device)
    return graphs


class EngineGraph:
    """A TensorRT engine. See `DeviceGraph`. Execution contexts are reused, each for one bound graph at a time."""

    def __init__(self, tensorrt: Any, engine: Any, spec: GraphSpec, device: CudaDevice) -> None:
        """Take an ICudaEngine that was deserialised from a file whose digest has been checked.

        Raises GraphError if its tensors differ from the graph's.
        """
        self.spec = spec
        self._engine, self._device = engine, device
        # Memory for the chosen profile only: a step needs far less than the longest prompts.
        self._strategy = tensorrt.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
        found = {engine.get_tensor_name(i) for i in range(engine.num_io_tensors)}
        expected = {tensor.name for tensor in (*spec.inputs, *spec.outputs)}
        if found != expected:
            raise GraphError(f"the engine of {spec.file} differs from it at {sorted(found ^ expected)}: build it again")
        self._profiles = [
            {tensor.name: engine.get_tensor_profile_shape(tensor.name, profile) for tensor in spec.inputs}
            for profile in range(engine.num_optimization_profiles)
        ]
        self._idle: list[list[Any]] = [[] for _ in self._profiles]

    def bind(self, tensors: Mapping[str, DeviceArray]) -> Bound:
        check_tensors(self.spec, tensors)
        profile = self._profile({tensor.name: tensors[tensor.name].shape for tensor in self.spec.inputs})
        context = self._idle[profile].pop() if self._idle[profile] else self._new_context(profile)
        for tensor in self.spec.inputs:
            if not context.set_input_shape(tensor.name, tensors[tensor.name].shape):
                raise DeviceError(f"TensorRT refused shape {tensors[tensor.name].shape} for {tensor.name}")
        for name, array in tensors.items():
            if not context.set_tensor_address(name, array.address):
                raise DeviceError(f"TensorRT refused the address of {name}")
        for tensor in self.spec.outputs:
            inferred = tuple(context.get_tensor_shape(tensor.name))
            if inferred != tensors[tensor.name].shape:
                raise GraphError(f"{tensor.name} of {self.spec.file} is {inferred}, not {tensors[tensor.name].shape}")
        return _BoundEngine(self._device, self.spec.file, context, self._idle[profile], tensors)

    def _profile(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Return the first optimization profile that covers all shapes."""
        misfits: list[list[str]] = []
        for index, ranges in enumerate(self._profiles):
            misfits.append([])
            for name, shape in shapes.items():
                low, _, high = map(tuple, ranges[name])
                if not all(a <= n <= b for a, n, b in zip(low, shape, high, strict=True)):
                    misfits[index].append(f"{name} {shape} is not within {low} to {high}")
            if not misfits[index]:
                return index
        raise InputError(
            f"no profile of the engine of {self.spec.file} takes this call: {min(misfits, key=len)[0]}: export it "
            "again with larger [limits] in its recipe"
        )

    def _new_context(self, profile: int) -> Any:
        context = self._engine.create_execution_context(self._strategy)
        if context is None or not context.set_optimization_profile_async(profile, self._device.stream):
            raise DeviceError(f"TensorRT made no execution context for {self.spec.file}: is there enough GPU memory?")
        return context


class _BoundEngine:
    """An engine with bound tensors.

    The first run is plain, since TensorRT prepares for the shapes. The second is recorded as a CUDA graph, which it and
    all later runs replay: one call instead of one for each kernel.

    is_replayed  None until it has been tried
    """

    def __init__(
        self, device: CudaDevice, file: str, context: Any, idle: list[Any], tensors: Mapping[str, DeviceArray]
    ) -> None:
        self._device, self._file, self._context, self._idle = device, file, context, idle
        self._tensors = tensors  # kept alive as long as the addresses are bound
        self._has_run = False
        self._launch: Callable[[], None] | None = None
        self.is_replayed: bool | None = None

    def run(self) -> None:
        if self._has_run and self.is_replayed is None:
            try:
                self._launch = self._device.capture(self._enqueue)
            except DeviceError:  # part of the engine cannot be recorded: run it plainly
                self._launch = None
            self.is_replayed = self._launch is not None
        if self._launch is not None:
            self._launch()
        else:
            self._enqueue()
        self._has_run = True

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self._device.stream):
            raise DeviceError(f"TensorRT did not run the engine of {self._file}: its log says why")

    def __del__(self) -> None:
        self._launch = None  # the recording is valid only while the context is unchanged
        self._idle.append(self._context)

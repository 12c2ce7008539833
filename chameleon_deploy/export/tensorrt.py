"""TensorRT engines from the portable graphs of a finished bundle, into the local cache.

One code path for TensorRT 10 and 11 and for TensorRT for RTX. Networks are strongly typed: every precision is
written in the graph, none is the builder's choice. TF32 is off, so that fp32 means fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chameleon_deploy.contract.bundle import open_bundle
from chameleon_deploy.contract.manifest import TensorSpec
from chameleon_deploy.errors import EngineError, ProfileError
from chameleon_deploy.runtime.device.engines import (
    AHEAD_OF_TIME,
    KIND,
    Device,
    compute_capabilities,
    engine_file,
    engine_graphs,
    engine_key,
    import_tensorrt,
    make_logger,
    released_on_error,
    target_device,
)
from chameleon_deploy.runtime.device.profiles import Profile, check_profile, profiles
from chameleon_deploy.store import local_cache
from chameleon_deploy.terminal.progress import Progress


def build_engines(path: Path, report: Progress) -> tuple[Path, Device]:
    """Build the engines of a bundle for this machine's GPU, or ahead of time with TensorRT for RTX if there is none.

    path    a bundle directory
    report  a progress callback

    Returns the directory in the local cache, built unless an intact one is there, and the device. Raises
    DependencyError, ProviderError, ProfileError, EngineError, OutputError, or what open_bundle raises.
    """
    bundle, tensorrt = open_bundle(path), import_tensorrt()
    device, manifest = target_device(tensorrt), bundle.manifest

    def build(directory: Path) -> None:
        for name in engine_graphs(manifest):
            graph = manifest.graphs[name]
            of_graph = profiles(manifest, graph)
            for profile in of_graph:
                check_profile(profile, manifest.model.max_positions)
            engine = build_engine(tensorrt, device, path / graph.file, graph.inputs, of_graph, report)
            (directory / engine_file(name)).write_bytes(engine)

    return local_cache.find_or_build(KIND, engine_key(bundle, tensorrt, device), build), device


@released_on_error
def build_engine(
    tensorrt: Any,
    device: Device,
    file: Path,
    inputs: Sequence[TensorSpec],
    of_graph: Sequence[Profile],
    report: Progress,
) -> memoryview:
    """Return one graph's engine, serialised.

    file      an ONNX graph; its external data is read from its directory
    inputs    of the graph, with symbolic shapes
    of_graph  one profile or more, in the order of their indices in the engine

    Raises EngineError for a graph that TensorRT does not accept, ProfileError for profiles that do not fit it.
    """
    logger = make_logger(tensorrt)
    builder = tensorrt.Builder(logger)
    # TensorRT 11 and TensorRT for RTX ignore the flag: they support strongly typed networks only.
    network = builder.create_network(1 << int(tensorrt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = tensorrt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(file)):
        raise EngineError(f"{file}: {_version(tensorrt)} cannot read it: {_parser_errors(parser)}")
    _check_inputs(file, network, inputs)

    config = builder.create_builder_config()
    config.clear_flag(tensorrt.BuilderFlag.TF32)
    for profile in of_graph:
        _add_profile(builder, config, profile, inputs)
    if device.name == AHEAD_OF_TIME:
        targets = compute_capabilities(tensorrt)
        config.num_compute_capabilities = len(targets)
        for index, target in enumerate(targets.values()):
            config.set_compute_capability(target, index)
    monitor = _make_monitor(tensorrt, f"engine {file.stem}", report)
    config.progress_monitor = monitor
    engine = builder.build_serialized_network(network, config)
    if monitor.interrupted:
        raise KeyboardInterrupt
    if engine is None:
        reason = " ".join("; ".join(logger.errors).split())[:500] or "no reason given"
        raise EngineError(f"{file}: {_version(tensorrt)} cannot build an engine from it: {reason}")
    return memoryview(engine)


def _check_inputs(file: Path, network: Any, inputs: Sequence[TensorSpec]) -> None:
    """Check that TensorRT's inputs are those of the manifest, from which profiles are made."""
    expected = {tensor.name: tuple(-1 if isinstance(d, str) else d for d in tensor.shape) for tensor in inputs}
    actual = {tensor.name: tuple(tensor.shape) for tensor in map(network.get_input, range(network.num_inputs))}
    if expected != actual:
        name = next(n for n in [*expected, *actual] if expected.get(n) != actual.get(n))
        raise EngineError(
            f"{file}: its inputs differ from the manifest at {name!r}: {actual.get(name)}, not {expected.get(name)}"
        )


def _add_profile(builder: Any, config: Any, profile: Profile, inputs: Sequence[TensorSpec]) -> None:
    built = builder.create_optimization_profile()
    try:
        for tensor in inputs:
            built.set_shape(tensor.name, *profile.shapes(tensor))
    except RuntimeError as error:
        raise ProfileError(f"TensorRT refuses the profile {profile}: {error}") from error
    if not built or config.add_optimization_profile(built) < 0:
        raise ProfileError(f"TensorRT refuses the profile {profile}")


def _parser_errors(parser: Any) -> str:
    """Return all of a parser's errors in one line, each with its node."""
    found = []
    for error in map(parser.get_error, range(parser.num_errors)):
        where = f"operator {error.node_operator()} at node {error.node_name()}: " if error.node_operator() else ""
        found.append(where + " ".join(error.desc().split())[:300])
    return "; ".join(found) or "no reason given"


def _version(tensorrt: Any) -> str:
    return f"{tensorrt.__name__} {tensorrt.__version__}"


def _make_monitor(tensorrt: Any, what: str, report: Progress) -> Any:
    """Return a tensorrt.IProgressMonitor that reports one bar in per mille and ends the build on Ctrl-C."""

    class Monitor(tensorrt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            tensorrt.IProgressMonitor.__init__(self)
            self.interrupted = False
            self._active: list[list[Any]] = []  # phase, steps, steps done; each inside a step of the previous one
            self._shown = 0  # a step may contain several phases, one after the other

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self._active.append([phase, steps, 0])

        def step_complete(self, phase: str, step: int) -> bool:
            try:
                for active in self._active:
                    if active[0] == phase:
                        active[2] = step + 1
                self._shown = max(self._shown, round(1000 * self._done()))
                report(what, self._shown, 1000)
            except KeyboardInterrupt:  # Python raises it here, in the only code of ours that runs during a build
                self.interrupted = True
            return not self.interrupted

        def phase_finish(self, phase: str) -> None:
            self._active = [active for active in self._active if active[0] != phase]
            if not self._active and not self.interrupted:
                report(what, 1000, 1000)

        def _done(self) -> float:
            done, share = 0.0, 1.0
            for _, steps, steps_done in self._active:
                share /= max(steps, 1)
                done += share * steps_done
            return done

    return Monitor()

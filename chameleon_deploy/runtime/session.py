"""ONNX Runtime: finding it, opening a graph with it, and refusing what differs from the manifest."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

from chameleon_deploy.bundle import Bundle, GraphSpec
from chameleon_deploy.errors import DependencyError, GraphError, ProviderError
from chameleon_deploy.local_cache import find_or_build
from chameleon_deploy.machine import describe_processor
from chameleon_deploy.runtime.inputs import check_threads

ExecutionProvider = tuple[str, dict[str, str]]
CPU: ExecutionProvider = ("CPUExecutionProvider", {})
PREPACKED = "prepacked"  # of the local cache's entries
DISTRIBUTIONS = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-openvino")


def import_onnxruntime() -> Any:
    """The onnxruntime module.

    Raises DependencyError when none is installed, or two whose files overwrite each other.
    """
    installed = [name for name in DISTRIBUTIONS if _is_installed(name)]
    if not installed:
        raise DependencyError("ONNX Runtime is not installed: pip install 'chameleon-deploy[cpu]' (or [gpu])")
    if len(installed) > 1:
        raise DependencyError(
            f"{' and '.join(installed)} are both installed and overwrite each other: "
            f"pip uninstall {' '.join(installed)}, then install one"
        )
    import onnxruntime

    return onnxruntime


def open_session(
    bundle: Bundle,
    graph: GraphSpec,
    threads: int | None,
    execution_provider: ExecutionProvider = CPU,
    share_weights: bool = False,
) -> Any:
    """An InferenceSession of one graph.

    threads             of one operator; None lets ONNX Runtime choose
    execution_provider  ONNX Runtime's name of it, and its options
    share_weights       on the CPU: map the weights from the local cache, see `load`; those of a hidden_scorer are
                        mapped from the bundle in any case

    Raises GraphError when the graph does not load or its signature is not the manifest's, ProviderError when
    ONNX Runtime would run it on another provider, OutputError when the local cache cannot be written.
    """
    options = _session_options(graph, threads)
    path = bundle.path / graph.file
    if share_weights and graph.role != "hidden_scorer":
        path = _prepacked_graph(bundle, graph, threads)
        # It was optimised before it was saved, and its packed weights belong to its nodes as they are.
        options.graph_optimization_level = import_onnxruntime().GraphOptimizationLevel.ORT_DISABLE_ALL
    session = _create_session(path, options, execution_provider)
    if session.get_providers()[0] != execution_provider[0]:  # it has logged why, and taken the CPU
        raise ProviderError(
            f"ONNX Runtime cannot use {execution_provider[0]} and would have run on the CPU: its CUDA or cuDNN "
            "libraries do not load: pip install 'onnxruntime-gpu[cuda,cudnn]'"
        )
    for kind, specs, found in (
        ("inputs", graph.inputs, session.get_inputs()),
        ("outputs", graph.outputs, session.get_outputs()),
    ):
        expected = {spec.name: (_ONNX_TYPES[spec.dtype], list(spec.shape)) for spec in specs}
        actual = {node.name: (node.type, list(node.shape)) for node in found}
        if expected != actual:
            name = next(n for n in [*expected, *actual] if expected.get(n) != actual.get(n))
            raise GraphError(
                f"{path}: its {kind} differ from the manifest at {name!r}: {actual.get(name)}, not {expected.get(name)}"
            )
    return session


def run(method: Any, *arguments: Any) -> Any:
    """Call a method of a session that runs its graph. Raises GraphError for whatever ONNX Runtime raises."""
    try:
        return method(*arguments)
    except Exception as error:  # onnxruntime raises several unrelated types
        raise GraphError(f"ONNX Runtime failed: {_one_line(error)}") from error


def _session_options(graph: GraphSpec, threads: int | None) -> Any:
    options = import_onnxruntime().SessionOptions()
    options.log_severity_level = 3  # errors: warnings about initializers help nobody who serves
    # A pattern per combination of shapes is kept for ever, and every batch has new shapes.
    options.enable_mem_pattern = False
    # Where weights alone are int8, ONNX Runtime would quantise the activations too.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if check_threads(threads) is not None:
        options.intra_op_num_threads = threads
    # Decoder and scorer take turns: threads that spin on after a call take the processors from the other's. This long
    # they wait for the next step of a generation.
    options.add_session_config_entry("session.intra_op.spin_duration_us", "500")
    if graph.role == "hidden_scorer":
        # Packed weights would be a copy of the head's matrix; as they are they stay in the file.
        options.add_session_config_entry("session.disable_prepacking", "1")
    if graph.role == "hypernetwork":
        # A second spinning thread pool costs the decoder more than it saves here.
        options.intra_op_num_threads = 1
    return options


def _create_session(path: Path, options: Any, execution_provider: ExecutionProvider) -> Any:
    try:
        return import_onnxruntime().InferenceSession(path, options, providers=[execution_provider])
    except Exception as error:  # onnxruntime raises several unrelated types
        raise GraphError(f"{path}: ONNX Runtime cannot load it: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _prepacked_graph(bundle: Bundle, graph: GraphSpec, threads: int | None) -> Path:
    """The optimised graph and its weights as this processor's kernels want them, in the local cache."""
    key = {
        "bundle": bundle.digest,
        "graph": graph.file,
        "onnxruntime": import_onnxruntime().__version__,
        "processor": describe_processor(),
    }

    def save(directory: Path) -> None:
        options = _session_options(graph, threads)
        options.optimized_model_filepath = str(directory / graph.file)
        for name, value in (
            ("optimized_model_external_initializers_file_name", "weights.bin"),
            ("optimized_model_external_initializers_min_size_in_bytes", "1024"),
            ("save_external_prepacked_constant_initializers", "1"),
        ):
            options.add_session_config_entry(f"session.{name}", value)
        _create_session(bundle.path / graph.file, options, CPU)
        bundle.require_weights()  # what is made of damaged weights must not get into the cache

    return find_or_build(PREPACKED, key, save) / graph.file


_ONNX_TYPES = {
    "bfloat16": "tensor(bfloat16)",
    "float32": "tensor(float)",
    "float16": "tensor(float16)",
    "int8": "tensor(int8)",
    "int32": "tensor(int32)",
    "int64": "tensor(int64)",
}


def _is_installed(distribution: str) -> bool:
    try:
        metadata.distribution(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True

"""Import ONNX Runtime, open a graph with it, and refuse a graph that differs from the manifest.

Integer products have uint8 activations and int8 weights. On x86 processors with AVX2 and without VNNI, ONNX Runtime
adds two neighbouring products of them in 16 bits (VPMADDUBSW), which saturate. With uint8 weights, larger by 128 and of
zero point 128, the sums are the same and exact everywhere, but slower where both are exact. ONNX Runtime converts
weights when it opens a graph, if it is told to. Which weights are exact is not taken from a list of processors: ONNX
Runtime itself is asked for sums that are known.
"""

from __future__ import annotations

from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from chameleon_deploy.contract.bundle import INTEGERS, Bundle, GraphSpec
from chameleon_deploy.errors import DependencyError, GraphError, ProviderError
from chameleon_deploy.runtime.inputs import check_threads
from chameleon_deploy.runtime.machine import describe_processor
from chameleon_deploy.store.local_cache import find_or_build

ExecutionProvider = tuple[str, dict[str, str]]
CPU: ExecutionProvider = ("CPUExecutionProvider", {})
PREPACKED = "prepacked"  # the kind of these entries in the local cache
IntegerWeights = Literal["int8", "uint8"]
# sums [rows, 32] of activations uint8 [rows, 64], of zero point 128, and weights of 127 and -128 in turn by column
INTEGER_PRODUCTS = Path(__file__).with_name("integer_products.onnx")  # written by tests/make_data.py
DISTRIBUTIONS = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-openvino")


def import_onnxruntime() -> Any:
    """Return the onnxruntime module.

    Raises DependencyError if none is installed, or two whose files overwrite each other.
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
    """Return an InferenceSession of one graph.

    threads             of one operator; None lets ONNX Runtime choose
    execution_provider  ONNX Runtime's name of it, and its options
    share_weights       on the CPU: map the weights from the local cache, see `load`; those of a hidden_scorer are
                        mapped from the bundle in any case

    Raises GraphError if the graph does not load or its signature differs from the manifest's, ProviderError if ONNX
    Runtime would run it on another provider or sums its integer products wrongly, OutputError if the local cache cannot
    be written.
    """
    options = _session_options(bundle, graph, threads)
    path = bundle.path / graph.file
    if share_weights and graph.role != "hidden_scorer":
        path = _prepacked_graph(bundle, graph, threads)
        # The graph was optimised before it was saved, and its packed weights fit its nodes only as they are.
        options.graph_optimization_level = import_onnxruntime().GraphOptimizationLevel.ORT_DISABLE_ALL
    session = _create_session(path, options, execution_provider)
    if session.get_providers()[0] != execution_provider[0]:  # ONNX Runtime logged the reason and fell back to the CPU
        raise ProviderError(
            f"ONNX Runtime cannot use {execution_provider[0]} and would have run on the CPU: its CUDA or cuDNN "
            "libraries do not load: pip install 'onnxruntime-gpu[cuda,cudnn]'"
        )
    for kind, specs, found in (
        ("inputs", graph.inputs, session.get_inputs()),
        ("outputs", graph.outputs, session.get_outputs()),
    ):
        expected = {spec.name: (_ONNX_TYPES[spec.dtype], list(spec.shape)) for spec in specs}
        try:
            actual = {node.name: (node.type, list(node.shape)) for node in found}
        except UnicodeDecodeError as error:  # ONNX Runtime does not check names
            raise GraphError(
                f"{path}: a name in the shapes of its {kind} is not UTF-8: export the bundle again"
            ) from error
        if expected != actual:
            name = next(n for n in [*expected, *actual] if expected.get(n) != actual.get(n))
            raise GraphError(
                f"{path}: its {kind} differ from the manifest at {name!r}: {actual.get(name)}, not {expected.get(name)}"
            )
    return session


def integer_weights(bundle: Bundle, graph: GraphSpec) -> IntegerWeights | None:
    """Return the type of the weights in a graph's integer products on this machine; None for a graph without any.

    Raises ProviderError, see `exact_weights`.
    """
    has_integer_products = bundle.manifest.precision in INTEGERS and graph.providers == ("cpu",)
    return exact_weights() if has_integer_products else None


@cache
def exact_weights() -> IntegerWeights:
    """Return the type of weights that ONNX Runtime multiplies exactly on this machine: "int8" if it can.

    Raises ProviderError if it multiplies neither exactly.
    """
    for weights in get_args(IntegerWeights):
        if _are_exact(weights):
            exact: IntegerWeights = weights
            return exact
    raise ProviderError(
        f"ONNX Runtime {import_onnxruntime().__version__} sums integer products wrongly on this processor, with int8 "
        "weights and with uint8: export with --precision fp32"
    )


def _are_exact(weights: IntegerWeights) -> bool:
    options = import_onnxruntime().SessionOptions()
    options.intra_op_num_threads = 1
    _convert_weights(options, weights)
    session = _create_session(INTEGER_PRODUCTS, options, CPU)
    right = np.array([64 * 127 * 127, 64 * 127 * -128] * 16, np.float32)
    # One row has kernels of its own.
    sums = [run(session.run, ["sums"], {"activations": np.full((rows, 64), 255, np.uint8)})[0] for rows in (1, 8)]
    return all(bool((found == right).all()) for found in sums)


def _convert_weights(options: Any, weights: IntegerWeights | None) -> None:
    if weights == "uint8":
        options.add_session_config_entry("session.x64quantprecision", "1")


def run(method: Any, *arguments: Any) -> Any:
    """Call a method of a session that runs its graph. Raises GraphError for whatever ONNX Runtime raises."""
    try:
        return method(*arguments)
    except Exception as error:  # onnxruntime raises several unrelated types
        raise GraphError(f"ONNX Runtime failed: {_one_line(error)}") from error


def _session_options(bundle: Bundle, graph: GraphSpec, threads: int | None) -> Any:
    options = import_onnxruntime().SessionOptions()
    options.log_severity_level = 3  # errors: warnings about initializers are of no use to a service
    # ONNX Runtime would keep a memory pattern for each combination of shapes forever, and every batch has new shapes.
    options.enable_mem_pattern = False
    # If only weights are int8, ONNX Runtime would quantise the activations too.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if bundle.manifest.precision == "int4" and "cpu" in graph.providers and len(graph.providers) > 1:
        # The portable graph would restore its 4-bit weights in every call: let them be folded to float32.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    if check_threads(threads) is not None:
        options.intra_op_num_threads = threads
    # Idle threads spin for 0.5 ms: long enough to catch the next decode step, short enough not to steal cores from the
    # scorer's session.
    options.add_session_config_entry("session.intra_op.spin_duration_us", "500")
    _convert_weights(options, integer_weights(bundle, graph))
    if graph.role == "hidden_scorer" and bundle.manifest.precision not in INTEGERS:
        # Packed weights would be a copy of the head's matrix; unpacked weights stay in the mapped file. In the
        # other precisions the matrix is transposed, a copy already.
        options.add_session_config_entry("session.disable_prepacking", "1")
    if graph.role == "encoder":  # its threads do not spin beside the decoder's
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if graph.role == "hypernetwork":
        # A second spinning thread pool would cost the decoder more than it saves here.
        options.intra_op_num_threads = 1
    return options


def _create_session(path: Path, options: Any, execution_provider: ExecutionProvider) -> Any:
    # On Arm processors with SME these kernels clamp what overflows to the largest float32, so that nobody would see it.
    options.add_session_config_entry("mlas.disable_kleidiai", "1")
    try:
        # Else it prints to standard output, and tries again with a provider that nobody asked for.
        return import_onnxruntime().InferenceSession(path, options, providers=[execution_provider], enable_fallback=0)
    except Exception as error:  # onnxruntime raises several unrelated types
        raise GraphError(f"{path}: ONNX Runtime cannot load it: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _prepacked_graph(bundle: Bundle, graph: GraphSpec, threads: int | None) -> Path:
    """Return the optimised graph and its weights, packed for this processor's kernels, in the local cache."""
    key = {
        "bundle": bundle.digest,
        "graph": graph.file,
        "onnxruntime": import_onnxruntime().__version__,
        "processor": describe_processor(),
        "integer_weights": integer_weights(bundle, graph) or "none",
    }

    def save(directory: Path) -> None:
        options = _session_options(bundle, graph, threads)
        options.optimized_model_filepath = str(directory / graph.file)
        for name, value in (
            ("optimized_model_external_initializers_file_name", "weights.bin"),
            ("optimized_model_external_initializers_min_size_in_bytes", "1024"),
            ("save_external_prepacked_constant_initializers", "1"),
        ):
            options.add_session_config_entry(f"session.{name}", value)
        _create_session(bundle.path / graph.file, options, CPU)
        bundle.require_weights()  # results of damaged weights must not enter the cache

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

"""Export a checkpoint to a bundle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx_ir as ir
from safetensors.numpy import save_file

from chameleon_deploy.contract.bundle import (
    FORMAT_VERSION,
    MANIFEST,
    AdaptationSpec,
    FileSpec,
    FloatArray,
    GraphSpec,
    LimitsSpec,
    Manifest,
    ModelSpec,
    ParitySummary,
    Precision,
    StoredTensor,
    TensorSpec,
    file_sha256,
)
from chameleon_deploy.contract.manifest import CHAT_TEMPLATE, ENCODER_TOKENIZER
from chameleon_deploy.contract.provenance import SIGNATURE
from chameleon_deploy.directory import new_directory
from chameleon_deploy.errors import InputError, ManifestError, UnsupportedBaseError
from chameleon_deploy.export.decoder import token_embedding_of
from chameleon_deploy.export.graphs import Graph, build_graphs
from chameleon_deploy.export.recipe import Limits
from chameleon_deploy.export.weights import WeightsFile
from chameleon_deploy.reference.adapters import AdaptedBase
from chameleon_deploy.reference.checkpoint import Checkpoint
from chameleon_deploy.reference.description import adaptation_spec, encoder_spec, model_spec, parameter_counts
from chameleon_deploy.reference.hypernetwork import StaticLoRA, factor_set
from chameleon_deploy.reference.sentence_encoder import SentenceEncoder
from chameleon_deploy.reference.source import Source
from chameleon_deploy.runtime import load
from chameleon_deploy.runtime.chat.template import load_chat_template
from chameleon_deploy.runtime.known_answers import FIELD, PARITY, known_answers
from chameleon_deploy.runtime.tokenizer_file import file_fault
from chameleon_deploy.terminal.progress import Progress, silent

TOOLS = ("chameleon-deploy", "onnx", "onnx-ir", "onnxscript", "torch", "transformers")  # recorded with their versions
DTYPES: dict[Any, Any] = {
    ir.DataType.FLOAT: "float32",
    ir.DataType.FLOAT16: "float16",
    ir.DataType.BFLOAT16: "bfloat16",
    ir.DataType.INT8: "int8",
    ir.DataType.INT32: "int32",
    ir.DataType.INT64: "int64",
}

# Called with a finished bundle before it is published: it returns the summary and the content of parity.json, or
# raises to refuse the export.
Verify = Callable[[Path], tuple[ParitySummary, dict[str, Any]]]


@dataclass(frozen=True)
class Publication:
    """What a finished bundle goes through before it appears.

    verify  checks the bundle at the path it is given; None records the bundle as not verified
    sign    makes the signature of bundle.json, see `provenance.read_signing_key`
    """

    verify: Verify | None = None
    sign: Callable[[bytes], bytes] | None = None


def export_bundle(
    checkpoint: Source,
    out: Path,
    publication: Publication = Publication(),
    limits: Limits = Limits(),  # noqa: B008  (immutable)
    precision: Precision = "fp32",
    calibration: Sequence[Path] | None = None,
    report: Progress = silent,
) -> Manifest:
    """Write a bundle directory, which appears as `out` when it is complete and verified.

    What the bundle computes of a few texts on this machine is recorded in parity.json (runtime/known_answers.py).

    limits       the largest call that engines built from it accept
    precision    of the matrices that are multiplied; except in int8, what is looked up stays float32
    calibration  files of text, on which int8 scales are measured; None takes that of the package
    report       is told what is being done

    Raises InputError, RecipeError, UnsupportedBaseError, OutputExistsError, OutputError, or what verify raises.
    """
    model = model_spec(checkpoint)
    if fault := file_fault(msgspec.json.decode(checkpoint.trunk.tokenizer.to_str())):
        raise UnsupportedBaseError(f"the base model's tokenizer.json: {fault}")
    resolved = limits.resolve(model, adaptation_spec(checkpoint).num_clusters)
    template = checkpoint.trunk.chat.source()
    with new_directory(out) as directory:
        if template is not None:
            _write_chat_template(template, directory / CHAT_TEMPLATE, checkpoint.trunk.tokenizer)
        manifest = _write_files(checkpoint, directory, model, resolved, precision, calibration, report)
        parity: dict[str, Any] = {"verified": False}
        manifest = _write_manifest(directory, manifest, parity)
        report("known answers", 0, 1)
        answers = {FIELD: msgspec.to_builtins(known_answers(load(directory)))}
        report("known answers", 1, 1)
        manifest = _write_manifest(directory, manifest, parity | answers)
        if publication.verify is not None:
            summary, parity = publication.verify(directory)
            manifest = _write_manifest(directory, msgspec.structs.replace(manifest, parity=summary), parity | answers)
        if publication.sign is not None:
            (directory / SIGNATURE).write_bytes(publication.sign((directory / MANIFEST).read_bytes()))
    return manifest


def _write_files(
    checkpoint: Source,
    directory: Path,
    model: ModelSpec,
    limits: LimitsSpec,
    precision: Precision,
    calibration: Sequence[Path] | None,
    report: Progress,
) -> Manifest:
    """Write everything but bundle.json and parity.json; the manifest does not list files yet."""
    spec = adaptation_spec(checkpoint)
    with WeightsFile(directory / "weights.bin") as weights_file:
        graphs = build_graphs(checkpoint, spec, precision, weights_file, calibration, report)
        specs = {name: _save_graph(name, graph, directory) for name, graph in graphs.items()}
        token_embedding = token_embedding_of(graphs["decoder"].model, checkpoint.trunk.spec)
    _save_factors(checkpoint, spec, directory)
    if isinstance(checkpoint, Checkpoint) and checkpoint.encoder is not None:
        (directory / ENCODER_TOKENIZER).write_text(_encoder_tokenizer(checkpoint.encoder), encoding="utf-8")
    (directory / "tokenizer.json").write_text(checkpoint.trunk.tokenizer.to_str(pretty=True), encoding="utf-8")
    return _manifest(checkpoint, model, spec, limits, precision, specs, token_embedding)


def _encoder_tokenizer(encoder: SentenceEncoder) -> str:
    """Return its tokenizer.json without the special tokens around a text, which the manifest has.

    Raises UnsupportedBaseError for one that no runtime loads.
    """
    content = msgspec.json.decode(encoder.tokenizer.to_str())
    content["post_processor"] = None
    if fault := file_fault(content):
        raise UnsupportedBaseError(f"the encoder's tokenizer.json: {fault}")
    return msgspec.json.format(msgspec.json.encode(content), indent=2).decode()


def _write_chat_template(source: str, file: Path, tokenizer: Any) -> None:
    """Raises InputError for a template that is not valid."""
    file.write_text(source, encoding="utf-8")
    try:
        load_chat_template(file, tokenizer)
    except ManifestError as error:
        raise InputError(f"{error}: pass another by --chat-template FILE", "chat_template") from error


def _save_factors(source: Source, spec: AdaptationSpec, directory: Path) -> None:
    """Write the factors of adapters or of a LoRA, and the centroids, if there are any."""
    if isinstance(source, AdaptedBase):
        if source.adapters:
            save_file(_stacked(source, spec), directory / "lora.safetensors")
        return
    if isinstance(source.factors, StaticLoRA):
        one_set = factor_set(source.factors(source.centroids.new_empty(1, 0)), 0, source.config.alpha)
        tensors = {name: np.ascontiguousarray(factor.numpy())[None] for name, factor in one_set.items()}
        save_file(tensors, directory / "lora.safetensors")
    if spec.num_clusters:
        save_file({"centroids": source.centroids.numpy()}, directory / "centroids.safetensors")


def _stacked(source: AdaptedBase, spec: AdaptationSpec) -> dict[str, FloatArray]:
    """Return the adapters' factors as one stack, zeros where an adapter has a smaller rank or another layer."""
    stacks = {}
    for name, width in spec.factor_widths.items():
        stack = stacks[name] = np.zeros((len(source.adapters), spec.rank, width), np.float32)
        for i, factors in enumerate(source.adapters.values()):
            if name in factors:
                stack[i, : len(factors[name])] = factors[name]
    return stacks


def _save_graph(name: str, graph: Graph, directory: Path) -> GraphSpec:
    ir.save(graph.model, directory / f"{name}.onnx")
    return GraphSpec(
        file=f"{name}.onnx",
        role=graph.role,
        cache=graph.cache,
        providers=graph.providers,
        inputs=_tensor_specs(graph.model.graph.inputs),
        outputs=_tensor_specs(graph.model.graph.outputs),
    )


def _manifest(
    checkpoint: Source,
    model: ModelSpec,
    spec: AdaptationSpec,
    limits: LimitsSpec,
    precision: Precision,
    graphs: dict[str, GraphSpec],
    token_embedding: StoredTensor,
) -> Manifest:
    return Manifest(
        format="chameleon-bundle",
        format_version=FORMAT_VERSION,
        precision=precision,
        model=model,
        adaptation=spec,
        limits=limits,
        parameters=parameter_counts(checkpoint, spec),
        graphs=graphs,
        token_embedding=token_embedding,
        files={},
        parity=ParitySummary(verified=False),
        checkpoint_digest=checkpoint.digest,
        tools={package: metadata.version(package) for package in TOOLS},
        encoder=encoder_spec(checkpoint),
    )


def _tensor_specs(values: Any) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(v.name, DTYPES[v.dtype], tuple(d if isinstance(d, int) else str(d.value) for d in v.shape))
        for v in values
    )


def _write_manifest(directory: Path, manifest: Manifest, parity: dict[str, Any]) -> Manifest:
    """Write parity.json, then bundle.json with the digests of everything else."""
    (directory / PARITY).write_bytes(_json(parity))
    names = sorted(file.name for file in directory.iterdir() if file.name != MANIFEST)
    known = {name: spec for name, spec in manifest.files.items() if name != PARITY}  # hash weights.bin once
    listed = {name: known.get(name) or _file_spec(directory / name) for name in names}
    manifest = msgspec.structs.replace(manifest, files=listed)
    (directory / MANIFEST).write_bytes(_json(manifest))
    return manifest


def _file_spec(file: Path) -> FileSpec:
    return FileSpec(file.stat().st_size, file_sha256(file))


def _json(value: Any) -> bytes:
    return msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n"

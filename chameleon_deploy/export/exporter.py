"""From a checkpoint to a bundle."""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import onnx_ir as ir
from safetensors.numpy import save_file

from chameleon_deploy.bundle import (
    FORMAT_VERSION,
    LM_HEAD,
    MANIFEST,
    AdaptationSpec,
    FileSpec,
    GraphSpec,
    LimitsSpec,
    Manifest,
    ModelSpec,
    Parameters,
    ParitySummary,
    Precision,
    Role,
    TargetSpec,
    TensorSpec,
    factor_names,
    file_sha256,
)
from chameleon_deploy.directory import new_directory
from chameleon_deploy.export.decoder import build_decoder, token_embedding_of
from chameleon_deploy.export.hypernetwork import build_hypernetwork, fold_lora_B
from chameleon_deploy.export.int8.cache import quantize_cache
from chameleon_deploy.export.int8.calibration import activations_of, highest_of_layers
from chameleon_deploy.export.int8.rotation import rotate_trunk, scale_trunk
from chameleon_deploy.export.int8.rows import quantize_rows
from chameleon_deploy.export.int8.weights import quantize_weights, rotate_residual
from chameleon_deploy.export.passes.flat_logits import flatten_logits
from chameleon_deploy.export.passes.half_precision import HALVES, float_products, halve_products
from chameleon_deploy.export.passes.shared_cache import share_cache
from chameleon_deploy.export.passes.sum_update import sum_update
from chameleon_deploy.export.readout import build_chooser, build_logits_scorer
from chameleon_deploy.export.recipe import Limits
from chameleon_deploy.export.tiled_scorer import build_tiled_scorer, give_hidden_states
from chameleon_deploy.export.weights import WeightsFile
from chameleon_deploy.reference.checkpoint import Checkpoint
from chameleon_deploy.reference.families import require_supported
from chameleon_deploy.reference.hypernetwork import Hypernetwork, num_factors, num_parameters
from chameleon_deploy.reference.model import Trunk

PROVIDERS = ("cpu", "cuda", "tensorrt")  # the portable graphs run everywhere
DEVICES = ("cuda", "tensorrt")  # where logits stay on the device

DTYPES: dict[Any, Any] = {
    ir.DataType.FLOAT: "float32",
    ir.DataType.FLOAT16: "float16",
    ir.DataType.BFLOAT16: "bfloat16",
    ir.DataType.INT8: "int8",
    ir.DataType.INT32: "int32",
    ir.DataType.INT64: "int64",
}

# Told about a finished bundle before it is published: it returns the summary and the content of
# parity.json, or raises to refuse the export.
Verify = Callable[[Path], tuple[ParitySummary, dict[str, Any]]]


def export_bundle(
    checkpoint: Checkpoint,
    out: Path,
    verify: Verify | None,
    limits: Limits = Limits(),  # noqa: B008  (immutable)
    precision: Precision = "fp32",
) -> Manifest:
    """Write a bundle directory, which appears as `out` when it is complete and verified.

    verify     checks the bundle at the path it is given; None records the bundle as not verified
    limits     the largest call that engines built from it accept
    precision  of the matrices that are multiplied; what is looked up stays float32: clusters do not depend on it

    Raises RecipeError, UnsupportedBaseError, OutputExistsError, OutputError, or what verify raises.
    """
    model = model_spec(checkpoint)
    resolved = limits.resolve(model, checkpoint.config.num_clusters)
    with new_directory(out) as directory:
        manifest = _write_files(checkpoint, directory, model, resolved, precision)
        parity: dict[str, Any] = {"verified": False}
        manifest = _write_manifest(directory, manifest, parity)
        if verify is not None:
            summary, parity = verify(directory)
            manifest = _write_manifest(directory, msgspec.structs.replace(manifest, parity=summary), parity)
    return manifest


def model_spec(checkpoint: Checkpoint) -> ModelSpec:
    """The dimensions of the base model. Raises UnsupportedBaseError for variants that would be exported wrongly."""
    trunk, config = checkpoint.trunk, checkpoint.trunk.config
    require_supported(config, checkpoint.config.base_model)
    return ModelSpec(
        architecture=config.model_type,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        max_positions=trunk.max_positions,
        eos_token_id=trunk.eos_token_id,
    )


def _write_files(
    checkpoint: Checkpoint, directory: Path, model: ModelSpec, limits: LimitsSpec, precision: Precision
) -> Manifest:
    config, trunk = checkpoint.config, checkpoint.trunk
    graphs: dict[str, GraphSpec] = {}
    with WeightsFile(directory / "weights.bin") as weights_file:
        decoder = _build_decoder(model, trunk, precision, weights_file)
        token_embedding = token_embedding_of(decoder, model)
        providers = DEVICES if precision in HALVES else PROVIDERS
        graphs["decoder"] = _save_graph(decoder, "decoder", "decoder", directory, providers, "growing")
        if precision in HALVES:
            float_products(decoder)
            graphs["decoder_cpu"] = _save_graph(decoder, "decoder_cpu", "decoder", directory, ("cpu",), "growing")
        else:
            scorer = _make_cpu_variant(decoder, model, precision, weights_file)
            graphs["decoder_cpu"] = _save_graph(decoder, "decoder_cpu", "decoder", directory, ("cpu",), "shared")
            graphs["hidden_scorer"] = _save_graph(scorer, "hidden_scorer", "hidden_scorer", directory, ("cpu",))
        if isinstance(checkpoint.factors, Hypernetwork):
            layers = [(layer.weight.numpy(), layer.bias.numpy()) for layer in checkpoint.factors.linears()]
            hypernetwork = build_hypernetwork(layers, config.rank, config.alpha, model, weights_file)
            graphs["hypernetwork"] = _save_graph(hypernetwork, "hypernetwork", "hypernetwork", directory, PROVIDERS)
        else:
            pair = checkpoint.factors.lora_A.numpy(), checkpoint.factors.lora_B.numpy()
            stacked = np.ascontiguousarray(pair[0])[None], fold_lora_B(pair[1], config.alpha)[None]
            save_file(dict(zip(factor_names(LM_HEAD), stacked, strict=True)), directory / "lora.safetensors")
    graphs["chooser"] = _save_graph(build_chooser(model), "chooser", "chooser", directory, DEVICES)
    logits_scorer = build_logits_scorer(model)
    graphs["logits_scorer"] = _save_graph(logits_scorer, "logits_scorer", "logits_scorer", directory, DEVICES)
    if config.num_clusters:
        save_file({"centroids": checkpoint.centroids.numpy()}, directory / "centroids.safetensors")
    trunk.tokenizer.save(str(directory / "tokenizer.json"))
    hypernetwork_size = num_parameters(checkpoint.factors) if config.regime == "chameleon" else 0
    return Manifest(
        format="chameleon-bundle",
        format_version=FORMAT_VERSION,
        precision=precision,
        model=model,
        adaptation=AdaptationSpec(
            regime=config.regime,
            rank=config.rank,
            alpha=config.alpha,
            targets=(TargetSpec(LM_HEAD, model.hidden_size, model.vocab_size),),
            num_clusters=config.num_clusters,
            protocol=config.protocol,
            max_length=config.max_length,
        ),
        limits=limits,
        parameters=Parameters(
            base=trunk.num_parameters(),
            factors=num_factors(model.hidden_size, model.vocab_size, config.rank),
            hypernetwork=hypernetwork_size,
        ),
        graphs=graphs,
        token_embedding=token_embedding,
        files={},
        parity=ParitySummary(verified=False),
        checkpoint_digest=checkpoint.digest,
        tools={name: metadata.version(name) for name in ("chameleon-deploy", "onnx", "onnx-ir", "onnxscript", "torch",
                                                         "transformers")},
    )  # fmt: skip


def _build_decoder(model: ModelSpec, trunk: Trunk, precision: Precision, weights_file: WeightsFile) -> ir.Model:
    """The portable decoder with its weights in weights_file, in the precision asked for."""
    if precision == "fp32":
        return build_decoder(model, trunk, weights_file)
    floats = weights_file.path.with_name("float32.bin")
    with WeightsFile(floats) as floats_file:
        if precision == "int8":
            trunk = rotate_trunk(trunk, model)
            scale_trunk(trunk, model, highest_of_layers(trunk, model))
            decoder = build_decoder(model, trunk, floats_file)
            rotate_residual(decoder, model)
            quantize_weights(decoder, activations_of(trunk), weights_file)
        else:
            decoder = build_decoder(model, trunk, floats_file)
            halve_products(decoder, HALVES[precision], weights_file)
    weights_file.take(decoder.graph)
    floats.unlink()
    return decoder


def _make_cpu_variant(decoder: ir.Model, model: ModelSpec, precision: Precision, weights_file: WeightsFile) -> ir.Model:
    """Rewrite the portable decoder in place for a shared cache. Returns the scorer that goes with it."""
    share_cache(decoder, model)
    if precision == "int8":
        quantize_cache(decoder, model)
        quantize_rows(decoder)
    give_hidden_states(decoder, model)
    scorer = build_tiled_scorer(decoder, model, weights_file)
    for graph in (decoder, scorer):
        sum_update(graph)
    flatten_logits(decoder)
    return scorer


def _save_graph(
    graph: ir.Model,
    name: str,
    role: Role,
    directory: Path,
    providers: tuple[str, ...],
    cache: Literal["growing", "shared"] | None = None,
) -> GraphSpec:
    ir.save(graph, directory / f"{name}.onnx")
    return GraphSpec(
        file=f"{name}.onnx",
        role=role,
        cache=cache,
        providers=providers,
        inputs=_tensor_specs(graph.graph.inputs),
        outputs=_tensor_specs(graph.graph.outputs),
    )


def _tensor_specs(values: Any) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(v.name, DTYPES[v.dtype], tuple(d if isinstance(d, int) else str(d.value) for d in v.shape))
        for v in values
    )


def _write_manifest(directory: Path, manifest: Manifest, parity: dict[str, Any]) -> Manifest:
    """Write parity.json, then bundle.json with the digests of everything else."""
    (directory / "parity.json").write_bytes(_json(parity))
    names = sorted(file.name for file in directory.iterdir() if file.name != MANIFEST)
    known = {name: spec for name, spec in manifest.files.items() if name != "parity.json"}  # hash weights.bin once
    listed = {name: known.get(name) or _file_spec(directory / name) for name in names}
    manifest = msgspec.structs.replace(manifest, files=listed)
    (directory / MANIFEST).write_bytes(_json(manifest))
    return manifest


def _file_spec(file: Path) -> FileSpec:
    return FileSpec(file.stat().st_size, file_sha256(file))


def _json(value: Any) -> bytes:
    return msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n"

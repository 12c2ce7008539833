"""The graphs of a bundle, by precision. No other module of export distinguishes precisions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import onnx_ir as ir
from safetensors.numpy import save_file
from torch import Tensor

from chameleon_deploy.contract.bundle import INTEGERS, AdaptationSpec, Precision, Role
from chameleon_deploy.export.decoder import build_decoder
from chameleon_deploy.export.encoder import build_encoder
from chameleon_deploy.export.graph import copy_of
from chameleon_deploy.export.hypernetwork import build_hypernetwork
from chameleon_deploy.export.int8.adapters import calibrate_with_factors, known_sets
from chameleon_deploy.export.int8.basis import basis_of
from chameleon_deploy.export.int8.blocks import multiply_blocks
from chameleon_deploy.export.int8.cache import quantize_cache
from chameleon_deploy.export.int8.calibration import calibration_texts
from chameleon_deploy.export.int8.digits import choose_two
from chameleon_deploy.export.int8.rotation import balance_trunk, rotate_trunk, scale_trunk, turned_keys
from chameleon_deploy.export.int8.rows import quantize_rows
from chameleon_deploy.export.int8.weights import quantize_embedding, quantize_weights, rotate_residual
from chameleon_deploy.export.passes.flat_factors import flatten_factors
from chameleon_deploy.export.passes.flat_logits import flatten_logits
from chameleon_deploy.export.passes.half_precision import HALVES, float_products, halve_products
from chameleon_deploy.export.passes.row_updates import choose_updates
from chameleon_deploy.export.passes.shared_cache import share_cache
from chameleon_deploy.export.passes.sum_update import sum_update
from chameleon_deploy.export.readout import build_chooser, build_logits_scorer
from chameleon_deploy.export.tiled_scorer import build_tiled_scorer, give_hidden_states
from chameleon_deploy.export.weights import WeightsFile
from chameleon_deploy.reference.checkpoint import Checkpoint
from chameleon_deploy.reference.families.spec import DecoderSpec
from chameleon_deploy.reference.hypernetwork import Hypernetwork, SharedHypernetwork
from chameleon_deploy.reference.source import Source
from chameleon_deploy.reference.text_to_lora import TextToLora
from chameleon_deploy.terminal.progress import Progress, silent

CPU = ("cpu",)
DEVICES = ("cuda", "tensorrt")  # providers where logits stay on the device
PROVIDERS = (*CPU, *DEVICES)  # the portable graphs run everywhere

Pass = Callable[[ir.Model, DecoderSpec], object]


@dataclass(frozen=True)
class Graph:
    """A graph with its role, providers and kind of cache: see GraphSpec."""

    model: ir.Model
    role: Role
    providers: tuple[str, ...]
    cache: Literal["growing", "shared"] | None = None


Graphs = dict[str, Graph]


def build_graphs(
    source: Source,
    spec: AdaptationSpec,
    precision: Precision,
    weights_file: WeightsFile,
    calibration: Sequence[Path] | None = None,
    report: Progress = silent,
) -> Graphs:
    """Return all graphs of a bundle by their names, with their weights in weights_file.

    spec         the linear layers that get low-rank updates
    calibration  files of text for int8 and int4

    Raises TensorError for a weight that float16 cannot represent; in int8 and int4 InputError for too little text, or
    for factors of the trunk that cannot be known.
    """
    model = source.trunk.spec
    if precision in INTEGERS:
        texts = calibration_texts(source.trunk, calibration)
        graphs = _integers(precision, source, spec, weights_file, texts, report)
    elif precision == "fp32":
        graphs = _fp32(source, spec, weights_file)
    else:
        graphs = _half(precision, source, spec, weights_file)
    if isinstance(source, Checkpoint) and isinstance(source.factors, Hypernetwork | SharedHypernetwork | TextToLora):
        size = spec.conditioning_size or model.hidden_size
        float16 = precision in INTEGERS
        hypernetwork = build_hypernetwork(source.factors, size, source.config.alpha, weights_file, float16)
        graphs["hypernetwork"] = Graph(hypernetwork, "hypernetwork", PROVIDERS)
    if isinstance(source, Checkpoint) and source.encoder is not None:
        graphs["encoder"] = Graph(build_encoder(source.encoder, weights_file), "encoder", CPU)
    graphs["chooser"] = Graph(build_chooser(model), "chooser", DEVICES)
    graphs["logits_scorer"] = Graph(build_logits_scorer(model), "logits_scorer", DEVICES)
    return graphs


def _fp32(source: Source, spec: AdaptationSpec, weights_file: WeightsFile) -> Graphs:
    decoder = build_decoder(source.trunk, spec.targets, weights_file)
    return {
        "decoder": Graph(decoder, "decoder", PROVIDERS, "growing"),
        **_cpu_graphs(decoder, source.trunk.spec),
    }


def _integers(
    precision: Precision,
    source: Source,
    spec: AdaptationSpec,
    weights_file: WeightsFile,
    texts: Sequence[Tensor],
    report: Progress,
) -> Graphs:
    trunk, known = source.trunk, known_sets(source)
    model, rotated = trunk.spec, rotate_trunk(trunk)
    statistics = calibrate_with_factors(trunk, rotated, spec, known, texts, report)
    balances = balance_trunk(rotated, statistics)
    tensors, shifts = basis_of(trunk, statistics.layers, statistics.first_tokens, balances).of(
        [target.name for target in spec.targets]
    )
    if tensors:
        save_file(tensors, weights_file.path.with_name("basis.safetensors"))
    scale_trunk(rotated, statistics)
    # Products with 4 bits have a scale for every 32 activations, beside which a second value would be lost.
    two_digits = choose_two(rotated, texts, report) if precision == "int8" else frozenset[str]()
    with _float32_weights(weights_file) as floats:
        decoder = build_decoder(rotated, spec.targets, floats, shifts)
        del rotated  # its weights are in the file
        rotate_residual(decoder, model)
        quantize_weights(decoder, model, statistics, weights_file, report, 8 if precision == "int8" else 4)
        quantize_embedding(decoder, model, statistics, trunk.is_tied, weights_file)
        weights_file.take(decoder.graph)
    quantization: tuple[Pass, ...] = (
        partial(quantize_cache, keys=turned_keys(model, statistics)),
        *([multiply_blocks] if precision == "int4" else []),
        partial(quantize_rows, two_digits=two_digits),
    )
    return {
        "decoder": Graph(decoder, "decoder", PROVIDERS, "growing"),
        **_cpu_graphs(decoder, model, quantization),
    }


def _half(precision: Precision, source: Source, spec: AdaptationSpec, weights_file: WeightsFile) -> Graphs:
    """Return the 16-bit graphs. The CPU has no 16-bit kernels: it runs the portable decoder with the same rounding
    in float32.
    """
    with _float32_weights(weights_file) as floats:
        decoder = build_decoder(source.trunk, spec.targets, floats)
        halve_products(decoder, HALVES[precision], weights_file)
        weights_file.take(decoder.graph)
    decoder_cpu = copy_of(decoder)
    float_products(decoder_cpu)
    return {
        "decoder": Graph(decoder, "decoder", DEVICES, "growing"),
        "decoder_cpu": Graph(decoder_cpu, "decoder", CPU, "growing"),
    }


@contextmanager
def _float32_weights(weights_file: WeightsFile) -> Iterator[WeightsFile]:
    """Yield a file next to weights_file for matrices before they are rounded. It is deleted at the end."""
    path = weights_file.path.with_name("float32.bin")
    with WeightsFile(path) as floats:
        yield floats
    path.unlink()


def _cpu_graphs(portable: ir.Model, model: DecoderSpec, quantization: tuple[Pass, ...] = ()) -> Graphs:
    """Return the decoder and the scorer of the CPU. The order of all passes is stated here.

    quantization  the passes of int8 and int4
    """
    decoder = copy_of(portable)
    of_trunk_and_head: tuple[Pass, ...] = (
        share_cache,  # first, because it looks for attention as attention.py builds it
        *quantization,  # of the operator that share_cache writes, then of products, the head's among them
        give_hidden_states,  # cuts off the head, where the scorer is extracted
    )
    for rewrite in of_trunk_and_head:
        rewrite(decoder, model)
    scorer = build_tiled_scorer(decoder, model)  # finds the head by the operators that the next passes rewrite
    sum_update(scorer)
    for last in (sum_update, flatten_logits, flatten_factors, choose_updates):  # the last one reads flat factors
        last(decoder)
    return {
        "decoder_cpu": Graph(decoder, "decoder", CPU, "shared"),
        "hidden_scorer": Graph(scorer, "hidden_scorer", CPU),
    }

"""The inputs and outputs that a graph of each role has for a model (docs/design.md section 5)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from chameleon_deploy.contract.manifest import (
    INTEGERS,
    LM_HEAD,
    AdaptationSpec,
    ElementType,
    GraphSpec,
    Manifest,
    Precision,
    TensorSpec,
    in_head,
)
from chameleon_deploy.errors import ManifestError

Dimension = int | str
Signature = tuple[list[TensorSpec], list[TensorSpec]]  # inputs, outputs


def check_graphs(manifest: Manifest, where: Path) -> None:
    """Check every name, dtype and dimension that the manifest lists for its graphs against its other fields.

    `where` is named in messages. Raises ManifestError.
    """
    for name, graph in manifest.graphs.items():
        at = f"{where}: graphs.{name}"
        # Checked first: it bounds the length of the lists that `_decoder` makes.
        if graph.role == "decoder" and manifest.model.num_layers > len(graph.inputs):
            raise ManifestError(f"{at}: fewer inputs than model.num_layers: export again")
        if graph.cache == "shared" and manifest.precision not in ("fp32", *INTEGERS):
            raise ManifestError(f"{at}: a shared cache does not exist in precision {manifest.precision}")
        inputs, outputs = _signature(graph, manifest)
        for kind, expected, actual in (("inputs", inputs, graph.inputs), ("outputs", outputs, graph.outputs)):
            if found := difference(expected, actual):
                raise ManifestError(f"{at}.{kind}: {found}: it does not fit the rest of the manifest, export again")


def difference(expected: Iterable[TensorSpec], actual: Iterable[TensorSpec]) -> str | None:
    """Return the first difference of two lists of tensors in any order, or None if they are equal."""
    wanted, found = {tensor.name: tensor for tensor in expected}, {tensor.name: tensor for tensor in actual}
    for name, tensor in wanted.items():
        if name not in found:
            return f"'{name}' is missing"
        if found[name] != tensor:
            return f"'{name}' is {_text(found[name])}, not {_text(tensor)}"
    if unknown := sorted(found.keys() - wanted.keys()):
        return f"'{unknown[0]}' is unknown"
    return None if len(found) == len(list(actual)) else "a name is listed twice"


def _signature(graph: GraphSpec, manifest: Manifest) -> Signature:
    model = manifest.model
    logits = _float("logits", "batch", "positions", model.vocab_size)
    match graph.role:
        case "decoder":
            return _decoder(graph, manifest)
        case "hypernetwork":
            return _hypernetwork(manifest)
        case "hidden_scorer":
            factors = _factors(manifest.adaptation, f"{LM_HEAD}.")
            inputs = [_float("hidden_states", "positions", model.hidden_size), _int("targets", "positions"), *factors]
            inputs += [_int("factor_ids", "positions")] if factors else []
            return inputs, [_float("logprobs", "positions")]
        case "encoder":
            size = manifest.adaptation.conditioning_size
            return [_int("input_ids", "batch", "sequence")], [_float("embeddings", "batch", size)]
        case "chooser":
            return [logits], [_int("token_ids", "batch", "positions")]
        case "logits_scorer":
            return [logits, _int("targets", "batch", "positions")], [_float("logprobs", "batch", "positions")]


def _decoder(graph: GraphSpec, manifest: Manifest) -> Signature:
    model = manifest.model
    is_shared = graph.cache == "shared"
    inputs = [
        _int("input_ids", "batch", "sequence"),
        _int("position_ids", "batch", "sequence"),
        _int("logits_positions", "batch", "positions"),
        _int("factor_ids", "batch"),  # without targets nothing reads them
        *_factors(manifest.adaptation, is_flat=is_shared),
    ]
    if is_shared:
        inputs += [
            TensorSpec("seqlens_k", "int32", ("batch",)),
            TensorSpec("total_sequence_length", "int32", ()),
            _int("num_logits", 1),
        ]
        outputs = [
            _float("logits", "batch*positions", model.vocab_size),
            _float("hidden_states", "batch", "positions", model.hidden_size),
        ]
    else:
        inputs.append(_int("attention_mask", "batch", "total"))
        outputs = [_float("logits", "batch", "positions", model.vocab_size)]
    past, present = ("capacity", "capacity") if is_shared else ("past", "total")
    for layer in range(model.num_layers):
        for kind in ("key", "value"):
            for tensors, name, width in ((inputs, "past_key_values", past), (outputs, "present", present)):
                shape = ("batch", model.num_key_value_heads, width, model.head_dim)
                tensors.append(TensorSpec(f"{name}.{layer}.{kind}", _cache_dtype(graph, manifest.precision), shape))
    return inputs, outputs


def _hypernetwork(manifest: Manifest) -> Signature:
    adaptation = manifest.adaptation
    factors = [_float(name, "factor_sets", adaptation.rank, width) for name, width in adaptation.factor_widths.items()]
    size = adaptation.conditioning_size or manifest.model.hidden_size
    return [_float("conditioning", "factor_sets", size)], factors


def _factors(adaptation: AdaptationSpec, prefix: str = "", is_flat: bool = False) -> list[TensorSpec]:
    """Return the factor tensors whose names begin with a prefix.

    is_flat  whether those of the trunk have one axis for sets and rank, whose sets column_ids tells
    """
    widths = {name: width for name, width in adaptation.factor_widths.items() if name.startswith(prefix)}
    flat = [name for name in widths if is_flat and not in_head(name)]
    factors = [
        _float(name, *(("columns",) if name in flat else ("factor_sets", "rank")), width)
        for name, width in widths.items()
    ]
    return ([_int("column_ids", "columns")] if flat else []) + factors


def _cache_dtype(graph: GraphSpec, precision: Precision) -> ElementType:
    """Return the element type of a decoder's cache. The CPU has no 16-bit kernels, so its cache is float32."""
    if graph.cache == "shared":
        return "int8" if precision in INTEGERS else "float32"
    if "cpu" in graph.providers:
        return "float32"
    halves: dict[Precision, ElementType] = {"fp16": "float16", "bf16": "bfloat16"}
    return halves.get(precision, "float32")


def _float(name: str, *shape: Dimension) -> TensorSpec:
    return TensorSpec(name, "float32", shape)


def _int(name: str, *shape: Dimension) -> TensorSpec:
    return TensorSpec(name, "int64", shape)


def _text(tensor: TensorSpec) -> str:
    return f"{tensor.dtype} [{', '.join(map(str, tensor.shape))}]"

"""bundle.json: the manifest's fields and the checks between them (docs/design.md section 5)."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Annotated, Literal, get_args

import msgspec
import numpy as np

from chameleon_deploy.errors import ManifestError, PathError, VersionError

MANIFEST = "bundle.json"
CHAT_TEMPLATE = "chat_template.jinja"  # listed where the model has one
ENCODER_TOKENIZER = "encoder_tokenizer.json"  # listed with a sentence encoder
FORMAT = "chameleon-bundle"
FORMAT_VERSION = 1

Int64 = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]  # the range that every reader of the format can hold
MAX_DIMENSION = 2**31 - 1  # graphs count tokens in int32

Mode = Literal["none", "static", "centroid", "request", "cohort", "tenant"]
TrainedRegime = Literal["chameleon", "lora"]  # of checkpoints
Regime = Literal["base", TrainedRegime]
Protocol = Literal["masked", "paper"]
Role = Literal["decoder", "hypernetwork", "chooser", "logits_scorer", "hidden_scorer", "encoder"]
Precision = Literal["fp32", "fp16", "bf16", "int8", "int4"]
# What each is for: docs/lab/int4.md has the figures.
PRECISION_USES: dict[Precision, str] = {
    "fp32": "the tokens of PyTorch",
    "fp16": "a GPU's memory and speed",
    "bf16": "a GPU's memory and speed, with the range of float32",
    "int8": "speed on a CPU, near to float32",
    "int4": "the least memory",
}
INTEGERS = ("int8", "int4")  # precisions whose trunk is rotated, whose head and cache are int8
ElementType = Literal["float32", "float16", "bfloat16", "int8", "int32", "int64"]

LM_HEAD = "lm_head"  # the target of every checkpoint so far, by its PEFT name
HEAD = f"{LM_HEAD}.weight"  # its matrix in decoder graphs
HEAD_BALANCE = "int8_weights.balance"  # in int8, factors of the channels that it reads
MAX_INVOCATION_TOKENS = 256
ADAPTER_NAME = "at most 64 letters, digits, '_', '-' and '.', the first a letter or a digit, and no mode's name"


def is_adapter_name(name: str) -> bool:
    """Return whether an adapter may have this name; see ADAPTER_NAME."""
    return re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name) is not None and name not in get_args(Mode)


def factor_names(target: str) -> tuple[str, str]:
    """Return the tensor names of one target's factors, A and B, in graphs, files and callers' factors."""
    return f"{target}.lora_A", f"{target}.lora_B"


def in_head(factor: str) -> bool:
    """Return whether a factor tensor is the head's: in shared-cache decoders those of the trunk have two axes."""
    return factor in factor_names(LM_HEAD)


def int8_names(name: str) -> tuple[str, str]:
    """Return a decoder graph's names of a matrix in int8, and of its scales."""
    return f"{name}.int8", f"{name}.scale"


def basis_names(target: str) -> tuple[str, ...]:
    """Return the tensor names of one target in basis.safetensors (runtime/basis.py)."""
    return tuple(f"{target}.{name}" for name in ("in_before", "in_block", "in_after", "out_blocks", "out_after"))


class TensorSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An input or output of a graph. A dimension is a number or a symbol such as "batch"."""

    name: str
    dtype: ElementType
    shape: tuple[Int64 | str, ...]


class GraphSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A graph: its role, the providers that may run it, and its signature.

    role   chooser: logits to the token with the highest; logits_scorer: logits and targets to log-probabilities;
           hidden_scorer: hidden states, targets and factors to log-probabilities, without whole logits
    cache  of a decoder: "growing", past and present are concatenated in the graph, or "shared", they are one buffer
    """

    file: str
    role: Role
    cache: Literal["growing", "shared"] | None
    providers: tuple[str, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


class StoredTensor(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A tensor inside a weights file: little-endian, row-major, at a byte offset.

    int8 rows are multiplied by scales of each row and of each channel, float32 at other offsets, and are rotated by a
    Hadamard matrix in blocks of `rotation` channels.
    """

    file: str
    dtype: Literal["float32", "float16", "int8"]
    shape: tuple[Int64, ...]
    offset: Int64
    row_scales_offset: Int64 | None = None
    channel_scales_offset: Int64 | None = None
    rotation: Int64 | None = None


class FileSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    size: Int64
    sha256: str


class ModelSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    architecture: str
    vocab_size: Int64
    hidden_size: Int64
    num_layers: Int64
    num_attention_heads: Int64
    num_key_value_heads: Int64
    head_dim: Int64
    max_positions: Int64
    eos_token_id: Int64


class TargetSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A linear layer that the factors adapt, by its PEFT name: A is [rank, in_features], B [rank, out_features]."""

    name: str
    in_features: Int64
    out_features: Int64


class AdaptationSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The adaptation of a bundle. alpha is recorded, not applied: it is folded into the factors at export.

    regime       base: no factors of its own. Files of adapters may update the targets, if there are any
    rank         of the bundle's own factors; in regime base the largest of an adapter, 0 without targets
    adapters     names of the sets in lora.safetensors; none if its one set has no name
    invocation_tokens  of those adapters that are activated, by name: a row is updated from the last of them on
    base_digest  of the base model's weights, which adapters of other files must have too; empty in a bundle that takes
                 none
    conditioning_size  of a vector that the caller gives with every text; 0: texts are conditioned on embeddings
    """

    regime: Regime
    rank: Int64
    alpha: float
    targets: tuple[TargetSpec, ...]
    num_clusters: Int64
    protocol: Protocol
    max_length: Int64
    adapters: tuple[str, ...] = ()
    base_digest: str = ""
    conditioning_size: Int64 = 0
    invocation_tokens: dict[str, tuple[Int64, ...]] = {}

    @property
    def modes(self) -> tuple[Mode, ...]:
        """Return the modes that the bundle can serve."""
        if self.regime == "base":
            return ("none", "static") if self.targets else ("none",)
        return available_modes(self.regime, self.num_clusters)

    @property
    def factor_widths(self) -> dict[str, int]:
        """Return every factor tensor's name with its last dimension; the others are [factor_sets, rank]."""
        return {
            name: width
            for target in self.targets
            for name, width in zip(factor_names(target.name), (target.in_features, target.out_features), strict=True)
        }


class EncoderSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The sentence encoder, which turns descriptions of tasks into conditioning vectors.

    size        of an embedding
    max_tokens  of a text, special tokens included
    prefix_ids, suffix_ids  the special tokens around a text
    conditioning_norm  the length to which an embedding is brought before the hypernetwork reads it; 0 leaves it
    full_stop   whether a description that ends in a letter gets a full stop
    """

    size: Int64
    vocab_size: Int64
    max_tokens: Int64
    prefix_ids: tuple[Int64, ...]
    suffix_ids: tuple[Int64, ...]
    conditioning_norm: float = 0.0
    full_stop: bool = False


class Parameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Parameter counts: the frozen base model, one factor set, the hypernetwork (0 without one)."""

    base: Int64
    factors: Int64
    hypernetwork: Int64


class LimitsSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The largest call that engines of fixed profiles (TensorRT) accept; ONNX Runtime has no limits.

    batch        rows
    sequence     tokens of a row in one call
    past         tokens of a row that are in the cache already
    factor_sets  factor sets
    """

    batch: Int64
    sequence: Int64
    past: Int64
    factor_sets: Int64


class ParitySummary(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Summarises parity.json.

    verified                  false when the export was told not to verify
    checks                    how many checks passed
    max_abs_logit_difference  largest difference of a logit from the reference's, relative to the logits' scale
    accepted_kl               the mean KL that `export --max-kl` accepted; None for the gates of the precision
    """

    verified: bool
    checks: Int64 = 0
    max_abs_logit_difference: float | None = None
    accepted_kl: float | None = None


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """bundle.json. encoder: of texts that describe tasks, in a bundle that has one"""

    format: Literal["chameleon-bundle"]
    format_version: Int64
    precision: Precision
    model: ModelSpec
    adaptation: AdaptationSpec
    limits: LimitsSpec
    parameters: Parameters
    graphs: dict[str, GraphSpec]
    token_embedding: StoredTensor
    files: dict[str, FileSpec]
    parity: ParitySummary
    checkpoint_digest: str
    tools: dict[str, str]
    encoder: EncoderSpec | None = None

    @property
    def has_basis(self) -> bool:
        """Return whether factors have to enter a basis (runtime/basis.py): those of an int8 or int4 trunk."""
        return self.precision in INTEGERS and any(target.name != LM_HEAD for target in self.adaptation.targets)


def available_modes(regime: TrainedRegime, num_clusters: int) -> tuple[Mode, ...]:
    """Return the modes of trained factors: generated ones need a hypernetwork, cohorts need centroids."""
    if regime == "lora":
        return ("none", "static")
    if not num_clusters:
        return ("none", "static", "request")
    return ("none", "static", "centroid", "request", "cohort", "tenant")


def limits_fault(limits: LimitsSpec, model: ModelSpec) -> str | None:
    """Return what is wrong with the limits, or None. Each is at least 1 and within the model's positions."""
    for name in limits.__struct_fields__:
        if getattr(limits, name) < 1:
            return f"limits.{name} must be at least 1, not {getattr(limits, name)}"
    for name, largest in (("sequence", model.max_positions), ("past", model.max_positions - 1)):
        if getattr(limits, name) > largest:
            return f"limits.{name} {getattr(limits, name)} is beyond the model's {model.max_positions} positions"
    return None


def default_mode(adaptation: AdaptationSpec) -> Mode:
    """Return the mode that the model was trained for, as far as the bundle can serve it."""
    if adaptation.adapters or adaptation.regime == "base":
        return "none"  # rows without an adapter
    preferred: tuple[Mode, ...] = ("cohort", "request", "static")
    return next(mode for mode in preferred if mode in adaptation.modes)


def parse_manifest(raw: bytes, where: Path) -> Manifest:
    """Decode and cross-check bundle.json. Raises ManifestError, VersionError or PathError."""
    try:
        head = msgspec.json.decode(raw)
        if not isinstance(head, dict) or head.get("format") != FORMAT:
            raise ManifestError(f'{where}: "format" is not "{FORMAT}"')
        if head.get("format_version") != FORMAT_VERSION:
            raise VersionError(
                f"{where}: format_version {head.get('format_version')!r}, this release reads {FORMAT_VERSION}: "
                "export the checkpoint again or install the matching release"
            )
        manifest = msgspec.convert(head, Manifest)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ManifestError(f"{where}: {error}") from error
    for name in manifest.files:
        if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,254}", name):
            raise PathError(f"{where}: file name {name!r} is not a plain name inside the bundle")
    _check_consistency(manifest, where)
    return manifest


def _check_consistency(manifest: Manifest, where: Path) -> None:
    model, adaptation = manifest.model, manifest.adaptation
    for name in ("vocab_size", "hidden_size", "num_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
                 "max_positions"):  # fmt: skip
        if not 1 <= getattr(model, name) <= MAX_DIMENSION:
            raise ManifestError(f"{where}: model.{name} must be between 1 and {MAX_DIMENSION}")
    if model.num_attention_heads % model.num_key_value_heads:
        raise ManifestError(f"{where}: model.num_attention_heads is not a multiple of model.num_key_value_heads")
    least_rank = 1 if adaptation.targets else 0
    if adaptation.rank < least_rank or adaptation.num_clusters < 0 or adaptation.max_length < 1:
        raise ManifestError(f"{where}: adaptation has a rank, num_clusters or max_length out of range")
    if not 0 <= model.eos_token_id < model.vocab_size:
        raise ManifestError(f"{where}: model.eos_token_id {model.eos_token_id} is outside the vocabulary")
    _check_targets(manifest, where)
    _check_adapters(adaptation, model.vocab_size, where)
    size = adaptation.conditioning_size
    if not 0 <= size <= MAX_DIMENSION or (size and (adaptation.regime != "chameleon" or adaptation.num_clusters)):
        raise ManifestError(f"{where}: adaptation.conditioning_size goes with regime 'chameleon' and no clusters")
    _check_encoder(manifest, where)
    if fault := limits_fault(manifest.limits, model):
        raise ManifestError(f"{where}: {fault}")
    needed = {"tokenizer.json", "parity.json", manifest.token_embedding.file}
    needed |= {graph.file for graph in manifest.graphs.values()}
    needed |= {"lora.safetensors"} if adaptation.regime == "lora" else set()
    needed |= {"basis.safetensors"} if manifest.has_basis else set()
    needed |= {ENCODER_TOKENIZER} if manifest.encoder is not None else set()
    needed |= {"centroids.safetensors"} if adaptation.num_clusters else set()
    for name in sorted(needed - set(manifest.files)):
        raise ManifestError(f"{where}: {name!r} is needed but not listed in files")
    roles = {graph.role for graph in manifest.graphs.values()}
    for name, graph in manifest.graphs.items():
        if (graph.cache is None) == (graph.role == "decoder"):
            raise ManifestError(f"{where}: graphs.{name}.cache does not fit its role {graph.role!r}")
    for role in {"decoder"} | ({"hypernetwork"} if adaptation.regime == "chameleon" else set()):
        if role not in roles:
            raise ManifestError(f"{where}: no graph has the role {role!r}")
    stored = manifest.token_embedding
    if stored.shape != (model.vocab_size, model.hidden_size):
        raise ManifestError(f"{where}: token_embedding has shape {stored.shape}, not [vocab_size, hidden_size]")
    int8 = stored.row_scales_offset, stored.channel_scales_offset, stored.rotation
    if any((part is None) == (stored.dtype == "int8") for part in int8):
        raise ManifestError(f"{where}: token_embedding needs offsets of scales and a rotation in int8, and only there")
    if stored.rotation is not None and (not _is_power_of_four(stored.rotation) or model.hidden_size % stored.rotation):
        raise ManifestError(f"{where}: token_embedding.rotation is not a power of four that divides hidden_size")
    parts = [(stored.offset, math.prod(stored.shape) * np.dtype(stored.dtype).itemsize)]
    if stored.row_scales_offset is not None and stored.channel_scales_offset is not None:
        parts += [
            (stored.row_scales_offset, 4 * model.vocab_size),
            (stored.channel_scales_offset, 4 * model.hidden_size),
        ]
    for offset, size in parts:
        if offset < 0 or offset + size > manifest.files[stored.file].size:
            raise ManifestError(f"{where}: token_embedding lies outside {stored.file}")


def _is_power_of_four(number: int) -> bool:
    return number > 0 and number.bit_count() == 1 and number.bit_length() % 2 == 1


def _check_targets(manifest: Manifest, where: Path) -> None:
    """Check that the targets are distinct and have dimensions; those of lm_head follow from the model. A base may
    have none.
    """
    targets, head = manifest.adaptation.targets, (manifest.model.hidden_size, manifest.model.vocab_size)
    needed = manifest.adaptation.regime != "base"
    if (needed and not targets) or len({target.name for target in targets}) < len(targets):
        raise ManifestError(f"{where}: adaptation.targets must name at least one layer, and each layer once")
    for target in targets:
        if not target.name or target.in_features < 1 or target.out_features < 1:
            raise ManifestError(f"{where}: adaptation.targets: {target.name!r} has no name or a dimension below 1")
        if target.name == LM_HEAD and (target.in_features, target.out_features) != head:
            raise ManifestError(f"{where}: adaptation.targets: {LM_HEAD} is not [hidden_size, vocab_size]")


def _check_encoder(manifest: Manifest, where: Path) -> None:
    """Check that an encoder has a graph, and that its embeddings are what the hypernetwork reads."""
    encoder, graphs = manifest.encoder, [graph for graph in manifest.graphs.values() if graph.role == "encoder"]
    if len(graphs) != (encoder is not None):
        raise ManifestError(f"{where}: encoder goes with one graph of the role 'encoder'")
    if encoder is None:
        return
    special = (*encoder.prefix_ids, *encoder.suffix_ids)
    if not 1 <= encoder.vocab_size <= MAX_DIMENSION or not len(special) < encoder.max_tokens <= MAX_DIMENSION:
        raise ManifestError(f"{where}: encoder has a vocab_size or max_tokens out of range")
    if not all(0 <= token < encoder.vocab_size for token in special):
        raise ManifestError(f"{where}: encoder has a special token outside its vocabulary")
    if encoder.size < 1 or encoder.size != manifest.adaptation.conditioning_size:
        raise ManifestError(f"{where}: encoder.size is not adaptation.conditioning_size")
    if not 0 <= encoder.conditioning_norm < math.inf:
        raise ManifestError(f"{where}: encoder.conditioning_norm is negative or not finite")


def _check_adapters(adaptation: AdaptationSpec, vocab_size: int, where: Path) -> None:
    names = adaptation.adapters
    if len(set(names)) < len(names) or not all(map(is_adapter_name, names)):
        raise ManifestError(f"{where}: adaptation.adapters must be distinct names of {ADAPTER_NAME}")
    if names and adaptation.regime != "lora":
        raise ManifestError(f"{where}: adaptation.adapters goes with a base_digest and regime 'lora'")
    if bool(adaptation.base_digest) != bool(names or adaptation.regime == "base"):
        raise ManifestError(f"{where}: adaptation.base_digest goes with adapters or regime 'base'")
    for name, tokens in adaptation.invocation_tokens.items():
        if name not in names:
            raise ManifestError(f"{where}: adaptation.invocation_tokens names {name!r:.80}, which is no adapter")
        if not 1 <= len(tokens) <= MAX_INVOCATION_TOKENS or not all(0 <= token < vocab_size for token in tokens):
            raise ManifestError(
                f"{where}: adaptation.invocation_tokens of {name} must be 1 to {MAX_INVOCATION_TOKENS} tokens of the "
                "vocabulary"
            )

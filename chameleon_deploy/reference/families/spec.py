"""A decoder as switches over one graph builder (export/trunk.py), derived from a Hugging Face configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

# The activation functions that the builder has, by their names in transformers.
ACTIVATIONS: dict[str, Literal["gelu", "gelu_tanh", "silu"]] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
}


@dataclass(frozen=True)
class Names:
    """Names of a model's modules, as transformers and PEFT have them. From `qkv` on they are within a layer.

    embedding             the token embedding
    position_embedding    learned positions, which are added to the residual stream; None without
    last_norm             its outputs are the final hidden states
    layer                 a layer, formatted with its number
    qkv                   the projections to queries, keys and values: three, or a single one to all
    o                     the output projection of attention
    up                    gate and up of the MLP, a single one to both, or its only inner projection
    down                  the output projection of the MLP
    attention_norm        of what attention reads, mlp_norm of what the MLP reads; None without
    attention_post_norm   of what attention adds to the residual stream, mlp_post_norm of what the MLP adds
    query_norm, key_norm  of queries and keys
    joined_qkv, joined_up the graph's names of matrices that hold several of qkv or up side by side
    """

    embedding: str
    last_norm: str
    layer: str
    qkv: tuple[str, ...]
    o: str
    up: tuple[str, ...]
    down: str
    attention_norm: str | None
    mlp_norm: str | None
    position_embedding: str | None = None
    attention_post_norm: str | None = None
    mlp_post_norm: str | None = None
    query_norm: str = ""
    key_norm: str = ""
    joined_qkv: str = ""
    joined_up: str = ""


@dataclass(frozen=True)
class LayerSpec:
    """The switches that may differ from layer to layer.

    rotary  module, or module.kind, whose cosines and sines turn queries and keys; None without a rotary embedding
    window  how many tokens a token may attend to, itself included; None for all before it
    """

    rotary: str | None = None
    window: int | None = None


class MatrixNames(NamedTuple):
    """The graph's names of a layer's four matrices."""

    qkv: str
    o: str
    up: str
    down: str


class LayerTargets(NamedTuple):
    """The linear layers behind each of those matrices, by their PEFT names, in the order of the matrix's channels."""

    qkv: tuple[str, ...]
    o: tuple[str, ...]
    up: tuple[str, ...]
    down: tuple[str, ...]


@dataclass(frozen=True)
class DecoderSpec:
    """All that export needs to know of a decoder, apart from its weights.

    norm                  layer norm, or RMS norm
    norm_offset           is added to the weights of norms
    query_key_norm        RMS norm of queries and keys, of each head or of all heads together
    rotary_dim            channels of a head that a rotary embedding turns, the first ones
    scale                 of the scores of attention
    attention_cap         c of c * tanh(score / c); None without
    logits_cap            the same, of the logits
    gated                 whether the MLP computes activation(gate) * up
    parallel              whether attention and MLP of a layer read the same residual stream
    interleaved           whether a single projection to queries, keys and values has them head by head
    transposed            whether linear layers store their weights as [in, out]
    embedding_multiplier  of the token embedding, residual_multiplier of what layers add to the residual stream,
                          logits_multiplier of the logits
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rotary_dim: int
    max_positions: int
    layers: tuple[LayerSpec, ...]
    names: Names
    norm: Literal["layer", "rms"]
    epsilon: float
    activation: Literal["gelu", "gelu_tanh", "silu"]
    scale: float
    gated: bool = True
    norm_offset: float = 0.0
    query_key_norm: Literal["head", "all"] | None = None
    attention_cap: float | None = None
    logits_cap: float | None = None
    parallel: bool = False
    interleaved: bool = False
    transposed: bool = False
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_multiplier: float = 1.0

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def splits_heads(self) -> bool:
        """Return whether attention takes queries, keys and values apart, not side by side."""
        return self.interleaved or self.query_key_norm is not None

    def scales_keys(self, i: int) -> bool:
        """Return whether factors of keys can be taken into the matrices of layer i: nothing is between the two."""
        return self.layers[i].rotary is None and self.query_key_norm is None

    def module(self, i: int, name: str) -> str:
        """Return the whole name of a module of layer i."""
        return f"{self.names.layer.format(i)}.{name}"

    def targets(self, i: int) -> LayerTargets:
        """Return the linear layers of layer i."""
        names = self.names
        parts = names.qkv, (names.o,), names.up, (names.down,)
        return LayerTargets(*(tuple(self.module(i, name) for name in part) for part in parts))

    def matrices(self, i: int) -> MatrixNames:
        """Return the graph's names of the matrices of layer i."""
        names = self.names
        qkv, up = (
            part[0] if len(part) == 1 else joined
            for part, joined in ((names.qkv, names.joined_qkv), (names.up, names.joined_up))
        )
        return MatrixNames(*(f"{self.module(i, name)}.weight" for name in (qkv, names.o, up, names.down)))

    def post_norms(self) -> list[str]:
        """Return the norms of what layers add to the residual stream, first to last."""
        kinds = self.names.attention_post_norm, self.names.mlp_post_norm
        return [self.module(i, name) for i in range(self.num_layers) for name in kinds if name is not None]


@dataclass(frozen=True)
class Family:
    """A family of decoders.

    name       model_type of its Hugging Face configurations
    models     examples, for readers
    spec       derives the switches from a configuration
    supported  the values of options that change results without a switch, by their names; None where there is none
    """

    name: str
    models: str
    spec: Callable[[Any], DecoderSpec]
    supported: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)


def num_key_value_heads(config: Any) -> int:
    """Return the number of key-value heads in a Hugging Face configuration; by default that of query heads."""
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def head_dim(config: Any) -> int:
    """Return the number of channels of a head in a Hugging Face configuration; by default the hidden size over the
    heads.
    """
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def rotary_embeddings(config: Any) -> dict[str, Any]:
    """Return the options of a configuration's rotary embeddings, by the kind of layer; one without a name for all.

    They are `rope_parameters` in transformers 5, `rope_scaling` in 4.
    """
    found = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    by_kind = {kind: options for kind, options in found.items() if isinstance(options, dict)}
    return by_kind or {"": found}


def rope_type(options: Mapping[str, Any]) -> str:
    """Return the kind of scaling of a rotary embedding, which older configurations call type."""
    return str(options.get("rope_type", options.get("type", "default")))


def max_positions(config: Any) -> int:
    """Return the largest number of tokens.

    The frequencies of a `longrope` depend on the length of a text: up to the positions of the original model it takes
    one set, beyond them another for all positions, cached keys included. Only the first can be served.
    """
    limits = [config.max_position_embeddings]
    for options in rotary_embeddings(config).values():
        if rope_type(options) == "longrope":
            original = options.get("original_max_position_embeddings")
            limits.append(original or config.original_max_position_embeddings)
    return int(min(limits))


def dimensions(config: Any) -> dict[str, Any]:
    """Return the fields of `DecoderSpec` that every configuration has under the same names."""
    partial = next(iter(rotary_embeddings(config).values())).get("partial_rotary_factor", 1.0)
    return {
        "architecture": config.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": num_key_value_heads(config),
        "head_dim": head_dim(config),
        "rotary_dim": int(head_dim(config) * partial),
        "max_positions": max_positions(config),
        "scale": head_dim(config) ** -0.5,
    }


def windows(config: Any) -> list[int | None]:
    """Return every layer's window; those of `layer_types`, or of all layers. One of all positions is none."""
    size, count = getattr(config, "sliding_window", None), config.num_hidden_layers
    if size is None or size >= max_positions(config) or not getattr(config, "use_sliding_window", True):
        return [None] * count
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * count
    return [size if kind == "sliding_attention" else None for kind in kinds[:count]]

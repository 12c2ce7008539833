"""Sentence encoders in the format of sentence-transformers: a BERT, MPNet or GTE model, pooling and normalisation.

A directory holds the model in Hugging Face format with tokenizer.json, and `modules.json`, which lists what follows the
model. Everything with an effect that is not read here is refused by name.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch
from torch import Tensor

from chameleon_deploy.errors import CheckpointError, UnsupportedBaseError
from chameleon_deploy.reference.model import encoding_whole_texts

MAX_CONFIG_BYTES = 2**20
Pooling = Literal["cls", "mean"]


@dataclass(frozen=True)
class EncoderFamily:
    """Where a family's state dict has the parts that every encoder has. Norms follow the sum with the residual.

    positions, types  embeddings that are added to those of the tokens; None in a family without
    first_position    of a text's first token, a row of the position embedding
    layer             with the number of a layer
    inner             the MLP's input projections: one, or a gate and what it multiplies
    """

    words: str
    positions: str | None
    types: str | None
    norm: str
    first_position: int
    layer: str
    projections: tuple[str, str, str]
    output: str
    attention_norm: str
    inner: tuple[str, ...]
    outer: str
    mlp_norm: str


_BERT = EncoderFamily(
    words="embeddings.word_embeddings", positions="embeddings.position_embeddings",
    types="embeddings.token_type_embeddings", norm="embeddings.LayerNorm", first_position=0, layer="encoder.layer.{}",
    projections=("attention.self.query", "attention.self.key", "attention.self.value"),
    output="attention.output.dense", attention_norm="attention.output.LayerNorm", inner=("intermediate.dense",),
    outer="output.dense", mlp_norm="output.LayerNorm",
)  # fmt: skip
FAMILIES = {
    "bert": _BERT,
    "mpnet": replace(
        _BERT, types=None, first_position=2, projections=("attention.attn.q", "attention.attn.k", "attention.attn.v"),
        output="attention.attn.o", attention_norm="attention.LayerNorm",
    ),
    "gte": replace(
        _BERT, positions=None, layer="layers.{}",
        projections=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), output="self_attn.o_proj",
        attention_norm="post_attention_layernorm", inner=("mlp.gate_proj", "mlp.up_proj"), outer="mlp.down_proj",
        mlp_norm="post_mlp_layernorm",
    ),
}  # fmt: skip


@dataclass
class SentenceEncoder:
    """A loaded encoder.

    model       the Hugging Face model
    tokenizer   the `tokenizers.Tokenizer` of its tokenizer.json
    prefix, suffix  the special tokens around a text
    max_tokens  of a text, special tokens included
    normalize   whether embeddings have length one
    """

    model: Any
    tokenizer: Any
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    pooling: Pooling
    normalize: bool
    max_tokens: int
    digest: str

    @property
    def family(self) -> EncoderFamily:
        return FAMILIES[self.model.config.model_type]

    @property
    def size(self) -> int:
        """Return the length of an embedding."""
        return int(self.model.config.hidden_size)

    @torch.no_grad()
    def embed(self, text: str) -> Tensor:
        """Return the embedding of one text, tokenized as the encoder's own tokenizer does."""
        ids = torch.tensor([self.tokenizer.encode(text).ids])
        hidden: Tensor = self.model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0]
        pooled = hidden[0] if self.pooling == "cls" else hidden.mean(0)
        return torch.nn.functional.normalize(pooled, dim=0) if self.normalize else pooled

    @torch.no_grad()
    def relative_bias(self) -> Tensor | None:
        """Return what MPNet adds to the scores of a query and a key [2 * positions - 1, heads], by how far the key is
        behind; None in families without.
        """
        compute = getattr(getattr(self.model, "encoder", None), "compute_position_bias", None)
        if compute is None:
            return None
        bias: Tensor = compute(torch.zeros(1, self.max_tokens, 1))[0]  # [heads, queries, keys]
        return torch.cat([bias[:, 1:, 0].flip(1), bias[:, 0]], 1).T

    @torch.no_grad()
    def rotation(self) -> tuple[Tensor, Tensor] | None:
        """Return cosines and sines [positions, head_dim / 2] of GTE's rotary embedding; None in families without."""
        rotary = getattr(self.model, "rotary_emb", None)
        if rotary is None:
            return None
        positions = torch.arange(self.max_tokens)[None]
        cosines, sines = rotary(torch.zeros(1, self.max_tokens, self.size), positions)
        half = cosines.shape[-1] // 2
        return cosines[0, :, :half], sines[0, :, :half]


def load_encoder(path: Path) -> SentenceEncoder:
    """Load a directory. Raises CheckpointError for files that are missing or wrong, UnsupportedBaseError for what is
    not deployed.
    """
    pooling, normalize = _modules(path)
    import transformers
    from tokenizers import Tokenizer

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    settings = _read(path / "sentence_bert_config.json")
    if settings.get("do_lower_case"):
        raise UnsupportedBaseError(f"{path}: do_lower_case: let the normalizer of tokenizer.json do it")
    if _read(path / "config_sentence_transformers.json").get("default_prompt_name"):
        raise UnsupportedBaseError(f"{path}: default_prompt_name: this release puts no prompt before a text")
    try:
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
        _require_supported(path, config)
        model = transformers.AutoModel.from_pretrained(path, dtype=torch.float32, local_files_only=True)
        tokenizer = encoding_whole_texts(Tokenizer.from_file(str(path / "tokenizer.json")))
    except UnsupportedBaseError:
        raise
    except Exception as error:
        raise CheckpointError(f"cannot load an encoder from {path}: {str(error).splitlines()[0]}") from error
    positions = config.max_position_embeddings - FAMILIES[config.model_type].first_position
    longest = min(int(settings.get("max_seq_length") or positions), positions)
    plain, whole = (tokenizer.encode("a", add_special_tokens=special).ids for special in (False, True))
    start = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), None)
    if not plain or start is None or longest <= len(whole):
        raise CheckpointError(f"{path}: its tokenizer and max_seq_length leave no room for a text")
    return SentenceEncoder(
        model.eval().requires_grad_(False), tokenizer, tuple(whole[:start]), tuple(whole[start + len(plain) :]),
        pooling, normalize, longest, _digest(path),
    )  # fmt: skip


def _modules(path: Path) -> tuple[Pooling, bool]:
    """Return how a directory pools, and whether it normalises."""
    file = path / "modules.json"
    if not file.is_file():
        raise CheckpointError(f"{path} has no modules.json: it is not a sentence encoder")
    modules = _read(file)
    try:
        kinds = [str(module["type"]).rpartition(".")[2] for module in modules]
        paths = [str(module["path"]) for module in modules]
    except (TypeError, KeyError) as error:
        raise CheckpointError(f"{file}: not a list of modules with type and path") from error
    if kinds[:2] != ["Transformer", "Pooling"] or kinds[2:] not in ([], ["Normalize"]):
        raise UnsupportedBaseError(f"{file}: {', '.join(kinds)}: deployed are Transformer, Pooling and Normalize")
    if paths[0] or not paths[1].replace("_", "").isalnum():
        raise CheckpointError(f"{file}: the path of a module is not in this directory")
    pooling = _read(path / paths[1] / "config.json")
    modes = {"cls": "pooling_mode_cls_token", "mean": "pooling_mode_mean_tokens"}
    chosen = [name for name, value in pooling.items() if name.startswith("pooling_mode") and value]
    for mode in ("cls", "mean"):
        if chosen == [modes[mode]] or pooling.get("pooling_mode") == mode:
            return ("cls" if mode == "cls" else "mean"), len(kinds) == 3
    raise UnsupportedBaseError(f"{path / paths[1]}: pooling by {', '.join(chosen) or 'nothing'}, not cls or mean")


def _require_supported(path: Path, config: Any) -> None:
    if config.model_type not in FAMILIES:
        raise UnsupportedBaseError(
            f"{path}: an encoder of model_type {config.model_type!r}: deployed are {', '.join(FAMILIES)}"
        )
    if getattr(config, "hidden_act", "gelu") != "gelu":
        raise UnsupportedBaseError(f"{path}: hidden_act {config.hidden_act!r}: deployed is gelu")
    if getattr(config, "position_embedding_type", None) not in (None, "absolute"):
        raise UnsupportedBaseError(f"{path}: position_embedding_type {config.position_embedding_type!r}")
    if getattr(config, "is_decoder", False):
        raise UnsupportedBaseError(f"{path}: is_decoder: deployed are encoders")
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") == "dynamic":
        raise UnsupportedBaseError(f"{path}: rope_type dynamic depends on a text's length")


def _read(file: Path) -> Any:
    """Return a JSON file; an empty object where there is none."""
    if not file.is_file():
        return {}
    with file.open("rb") as opened:
        content = opened.read(MAX_CONFIG_BYTES + 1)
    try:
        if len(content) > MAX_CONFIG_BYTES:
            raise CheckpointError(f"{file}: over {MAX_CONFIG_BYTES} bytes are no configuration")
        return msgspec.json.decode(content)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"{file}: {error}") from error


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    for name in ("config.json", "modules.json", "tokenizer.json", "model.safetensors", "pytorch_model.bin"):
        if (path / name).is_file():
            with (path / name).open("rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()

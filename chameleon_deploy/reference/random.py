"""A checkpoint of random weights, a GPT-2 of any size or a Llama, to try export, verify and bench without training.

python -m chameleon_deploy.reference.random --size small --out models/random-small
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer

from chameleon_deploy import console
from chameleon_deploy.bundle import Regime
from chameleon_deploy.errors import OutputExistsError
from chameleon_deploy.reference.checkpoint import CheckpointConfig, build_factors, save_checkpoint
from chameleon_deploy.reference.clustering import embed_texts, fit_centroids
from chameleon_deploy.reference.corpus import encode_texts
from chameleon_deploy.reference.presets import PAPER
from chameleon_deploy.reference.python_corpus import KINDS, python_texts
from chameleon_deploy.reference.tiny import save_base, train_tokenizer

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


def random_checkpoint(out: Path, base: Any, regime: Regime = "chameleon", num_clusters: int = 4, seed: int = 0) -> None:
    """Write out/base and its checkpoint. The centroids come from real text, the weights from the seed.

    base  a size, or a Hugging Face configuration

    Raises OutputExistsError.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if out.exists():
        raise OutputExistsError(f"{out} exists: choose another --out or delete it")
    torch.manual_seed(seed)
    config = base_config(base) if isinstance(base, str) else base
    model = transformers.AutoModelForCausalLM.from_config(config)
    texts = [text for kind in KINDS for text in python_texts(kind)[:200]]
    tokenizer = train_tokenizer(texts, config.vocab_size)
    out.mkdir(parents=True)
    save_base(model, tokenizer, out / "base")
    checkpoint = CheckpointConfig(
        regime=regime,
        base_model="./base",
        rank=PAPER.rank,
        hidden_sizes=PAPER.hidden_sizes(num_clusters) if regime == "chameleon" else (),
        num_clusters=num_clusters,
        max_length=min(PAPER.max_length, config.max_position_embeddings),
    )
    table = model.get_input_embeddings().weight.detach()
    ids = encode_texts(texts, tokenizer, "masked", checkpoint.max_length)
    centroids = fit_centroids(embed_texts(ids, table, "masked", checkpoint.max_length, 0), num_clusters, seed)
    save_checkpoint(out, checkpoint, build_factors(checkpoint, config.hidden_size, config.vocab_size), centroids)


def main(
    out: Annotated[Path, typer.Option(help="Checkpoint directory to write.")],
    size: Annotated[
        Literal["mini", "small", "medium", "large", "xl", "llama-mini", "smollm2-135m"],
        typer.Option(help="Size of the base model: GPT-2 up to xl, Llama from there."),
    ] = "small",
    regime: Annotated[Literal["chameleon", "lora"], typer.Option(help="Regime of the factors.")] = "chameleon",
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Make a checkpoint of random weights."""
    random_checkpoint(out, size, regime, seed=seed)


if __name__ == "__main__":
    console.run(main)

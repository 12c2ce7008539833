"""The tiny model in models/tiny, from scratch: `python -m chameleon_deploy.reference.tiny --out models/tiny`.

A byte-level BPE of 2,048 tokens and a GPT-2 of 1.3 million parameters are trained on text of the Python installation,
then the head in the regimes lora and chameleon. It takes about 20 minutes on 2 cores.
"""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from chameleon_deploy.reference import corpus
from chameleon_deploy.reference.checkpoint import CheckpointConfig
from chameleon_deploy.reference.model import load_trunk
from chameleon_deploy.reference.presets import PAPER
from chameleon_deploy.reference.python_corpus import KINDS, python_texts
from chameleon_deploy.reference.training import TrainingInputs, train_checkpoint
from chameleon_deploy.terminal import console
from chameleon_deploy.terminal.progress import Progress

VOCAB_SIZE, POSITIONS, HIDDEN, LAYERS, HEADS = 2048, 256, 128, 5, 4
END_OF_TEXT = "<|endoftext|>"


def corpus_splits() -> dict[str, corpus.Split]:
    """Split every kind of text: a tenth for tests, a tenth of the rest for validation."""
    return {kind: _splits(python_texts(kind)) for kind in KINDS}


def _splits(texts: list[str]) -> corpus.Split:
    rest, test = corpus.split_texts(texts, 0.1)
    return corpus.Split(*corpus.split_texts(rest, 0.1, "validation"), test)


def train_tokenizer(texts: list[str], vocab_size: int) -> Any:
    """Return a byte-level BPE of at most vocab_size tokens, as a `tokenizers.Tokenizer`; END_OF_TEXT has id 0."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def train_base(texts: list[str], steps: int, seed: int, out: Path, report: Progress) -> None:
    """Train a GPT-2 from scratch on all texts, each ended by END_OF_TEXT, and save it in Hugging Face format."""
    import transformers

    transformers.logging.set_verbosity_error()
    torch.manual_seed(seed)
    random.Random(seed).shuffle(texts)
    tokenizer = train_tokenizer(texts, VOCAB_SIZE)
    end = tokenizer.token_to_id(END_OF_TEXT)
    stream = torch.tensor([i for encoding in tokenizer.encode_batch(texts) for i in [*encoding.ids, end]])
    config = transformers.GPT2Config(
        vocab_size=VOCAB_SIZE, n_positions=POSITIONS, n_embd=HIDDEN, n_layer=LAYERS, n_head=HEADS,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=end, eos_token_id=end,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.05)
    for step in range(steps):
        loss = _language_model_loss(model, stream)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        report("base model (steps)", step + 1, steps)
    save_base(model, tokenizer, out)


def save_base(model: Any, tokenizer: Any, out: Path) -> None:
    """Write a base model directory in Hugging Face format, tokenizer included."""
    import transformers

    model.save_pretrained(out)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT,
        model_max_length=model.config.max_position_embeddings,
    ).save_pretrained(out)  # fmt: skip


def _language_model_loss(model: Any, stream: Tensor, batch_size: int = 16) -> Tensor:
    starts = torch.randint(0, len(stream) - POSITIONS - 1, (batch_size,))
    windows = torch.stack([stream[s : s + POSITIONS + 1] for s in starts.tolist()])
    logits = model(windows[:, :-1]).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


def main(
    out: Annotated[Path, typer.Option(help="Directory to write base/, chameleon/ and lora/ into.")],
    steps: Annotated[int, typer.Option(min=1, help="Training steps of the base model, 4,096 tokens each.")] = 2500,
    epochs: Annotated[int | None, typer.Option(min=1, help="Epochs of the head.")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Make the tiny model from the text of this Python installation."""
    splits = corpus_splits().values()
    train = [text for split in splits for text in split.train]
    validation = [text for split in splits for text in split.validation]
    base = out / "base"
    with console.progress() as report:
        if not base.exists():
            train_base(list(train), steps, seed, base, report)
        trunk = load_trunk(base)
        for regime in ("lora", "chameleon"):
            checkpoint = out / regime
            config = CheckpointConfig(
                regime="lora" if regime == "lora" else "chameleon",
                base_model=os.path.relpath(base, checkpoint),
                rank=PAPER.rank,
                hidden_sizes=() if regime == "lora" else PAPER.hidden_sizes(len(KINDS)),
                num_clusters=len(KINDS),
                max_length=POSITIONS,
            )
            settings = PAPER.with_options(epochs=epochs, seed=seed).training
            state = train_checkpoint(trunk, config, TrainingInputs(train, validation), checkpoint, settings, report)
            console.stdout.print(f"{checkpoint}: best epoch {state.best_epoch}, validation loss {state.best_loss:.4f}")


if __name__ == "__main__":
    console.run(main)

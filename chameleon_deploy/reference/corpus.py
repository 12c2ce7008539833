"""Training text: tokenised, cut to length, split into training and held-out parts."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

from chameleon_deploy.errors import DatasetError, DependencyError, InputError


class Split(NamedTuple):
    """Texts of three purposes, none in two of them.

    train       texts that parameters, clusters and counts are made from
    validation  texts that choose: the best epoch, the pseudo-count
    test        texts whose figures are reported; nothing else depends on them
    """

    train: list[str]
    validation: list[str]
    test: list[str]


def load_dataset_texts(name: str, split: Literal["train", "validation", "test"]) -> list[str]:
    """Texts of one split of a named Hugging Face dataset with a "text" column; `wikitext` means wikitext-2-raw-v1.

    Raises DatasetError when it cannot be reached, DependencyError without the `datasets` package.
    """
    try:
        import datasets  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        raise DependencyError(
            "--dataset needs a package: pip install 'chameleon-deploy[datasets]', or pass files with --text"
        ) from error
    arguments = ("Salesforce/wikitext", "wikitext-2-raw-v1") if name == "wikitext" else (name,)
    try:
        rows = datasets.load_dataset(*arguments, split=split)
        return [text for text in rows["text"] if text.strip()]
    except Exception as error:
        raise DatasetError(
            f"dataset {name!r} cannot be loaded ({type(error).__name__}): check the name and the network, "
            "or pass files with --text"
        ) from error


def split_texts(texts: Sequence[str], held_out: float, salt: str = "") -> tuple[list[str], list[str]]:
    """Training and held-out texts. A text's side depends on its content alone, so equal texts never straddle.

    salt  a second split of one side needs another, or it would find that side's texts all on one side again
    """
    sides: tuple[list[str], list[str]] = ([], [])
    for text in texts:
        share = int.from_bytes(hashlib.sha256((salt + text).encode()).digest()[:8], "big") / 2**64
        sides[share < held_out].append(text)
    return sides


def sample_texts(texts: Sequence[str], count: int | None, seed: int) -> list[str]:
    """`count` of the texts, drawn by the seed, in their order; None or more than there are: all."""
    if count is None or count >= len(texts):
        return list(texts)
    return [texts[i] for i in sorted(random.Random(seed).sample(range(len(texts)), count))]


def encode_texts(texts: Sequence[str], tokenizer: Any, protocol: str, max_length: int) -> list[list[int]]:
    """Token ids of at most max_length each.

    `paper` cuts a longer text off, as the authors' scripts do; `masked` goes on in a new text.
    Texts of fewer than two tokens have nothing to predict and are left out.

    Raises InputError when no text is left.
    """
    encoded = [encoding.ids for encoding in tokenizer.encode_batch(list(texts), add_special_tokens=False)]
    pieces = [ids[:max_length] for ids in encoded] if protocol == "paper" else list(_pieces(encoded, max_length))
    pieces = [ids for ids in pieces if len(ids) >= 2]
    if not pieces:
        raise InputError("no text of at least two tokens: there is nothing to train or measure on")
    return pieces


def _pieces(encoded: list[list[int]], max_length: int) -> Iterator[list[int]]:
    for ids in encoded:
        for start in range(0, len(ids), max_length):
            yield ids[start : start + max_length]

"""Training text: tokenised, cut to length, split into training and held-out parts."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from chameleon_deploy.errors import DatasetError, DependencyError, InputError


class Split(NamedTuple):
    """Disjoint texts for three purposes.

    train       for parameters, clusters and counts
    validation  for choices: the best epoch, the pseudo-count
    test        for reported figures only
    """

    train: list[str]
    validation: list[str]
    test: list[str]


def load_dataset_texts(name: str, split: Literal["train", "validation", "test"]) -> list[str]:
    """Return the texts of one split of a named Hugging Face dataset with a "text" column; `wikitext` is
    wikitext-2-raw-v1.

    Raises DatasetError if it cannot be reached, DependencyError without the `datasets` package.
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
    """Return training and held-out texts. The side of a text depends on its content only, so equal texts are on one
    side.

    salt  must differ for a second split of one side, which would otherwise put all its texts on one side again
    """
    sides: tuple[list[str], list[str]] = ([], [])
    for text in texts:
        share = int.from_bytes(hashlib.sha256((salt + text).encode()).digest()[:8], "big") / 2**64
        sides[share < held_out].append(text)
    return sides


def sample_texts(texts: Sequence[str], count: int | None, seed: int) -> list[str]:
    """Return `count` of the texts, drawn by the seed, in their order; all of them if it is None or too large."""
    if count is None or count >= len(texts):
        return list(texts)
    return [texts[i] for i in sorted(random.Random(seed).sample(range(len(texts)), count))]


def prefix_ids(tokenizer: Any) -> list[int]:
    """Return the special tokens that tokenizer.json puts before a text, as many models' `<bos>`; of GPT-2's there are
    none.
    """
    ids: list[int] = tokenizer.encode("").ids
    return ids


def encode_texts(texts: Sequence[str], tokenizer: Any, protocol: str, max_length: int) -> list[list[int]]:
    """Return token ids of at most max_length each.

    `paper` truncates a longer text, as the authors' scripts do; `masked` continues it as a new text. Each begins with
    the special tokens that tokenizer.json puts before a text. Texts of fewer than two tokens have nothing to predict
    and are left out.

    Raises InputError if no text is left.
    """
    return [ids for _, ids in encode_pieces(texts, tokenizer, protocol, max_length)]


def encode_pieces(texts: Sequence[str], tokenizer: Any, protocol: str, max_length: int) -> list[tuple[int, list[int]]]:
    """Return what `encode_texts` does, each with the index of the text that it is from."""
    encoded = [encoding.ids for encoding in tokenizer.encode_batch(list(texts), add_special_tokens=False)]
    first = prefix_ids(tokenizer)
    room = max(max_length - len(first), 1)
    pieces = [
        (text, [*first, *ids[start : start + room]][:max_length])
        for text, ids in enumerate(encoded)
        for start in (range(1) if protocol == "paper" else range(0, len(ids), room))
    ]
    pieces = [(text, ids) for text, ids in pieces if len(ids) >= 2]
    if not pieces:
        raise InputError("no text of at least two tokens: there is nothing to train or measure on")
    return pieces

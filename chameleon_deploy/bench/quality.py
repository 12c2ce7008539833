"""How far each engine's logits lie from PyTorch's in float32, on windows of real text, with the base model alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from chameleon_deploy.bench.peers import Peer, Readable, Rows
from chameleon_deploy.errors import InputError
from chameleon_deploy.reference.corpus import prefix_ids
from chameleon_deploy.reference.model import Trunk
from chameleon_deploy.reference.python_corpus import KINDS, python_texts
from chameleon_deploy.terminal.progress import Progress
from chameleon_deploy.terminal.texts import read_texts
from chameleon_deploy.verify.logit_figures import LogitFigures


@dataclass(frozen=True)
class Quality:
    """The quality of one engine without adaptation, over all positions of all windows.

    mean_kl, p999_kl      KL divergence from the reference: the mean and the 99.9th percentile
    top1                  share of positions with the reference's most likely token
    perplexity            of the engine
    reference_perplexity  of the reference on the same windows
    size                  bytes of the engine's files; of PyTorch, of its parameters
    """

    mean_kl: float
    p999_kl: float
    top1: float
    perplexity: float
    reference_perplexity: float
    size: int


def text_windows(trunk: Trunk, files: Sequence[Path], count: int, width: int) -> list[list[int]]:
    """Return `count` windows of `width` tokens, evenly spaced over the text of the files.

    files  none for the text of this Python installation

    Raises InputError for files that cannot be read or are too short.
    """
    texts = read_texts(files) if files else [text for kind in KINDS for text in python_texts(kind, 200)]
    ids = trunk.tokenizer.encode("\n\n".join(texts), add_special_tokens=False).ids
    width = min(width, trunk.max_positions)
    if len(ids) < count * width:
        raise InputError(f"the text has {len(ids)} tokens: {count} windows of {width} need {count * width}")
    first, starts = prefix_ids(trunk.tokenizer), range(0, count * (len(ids) // count), len(ids) // count)
    return [[*first, *ids[start : start + width]][:width] for start in starts]


@torch.no_grad()
def measure_quality(peers: Iterable[Peer], trunk: Trunk, windows: Rows, report: Progress) -> dict[str, Quality | str]:
    """Return the quality of every engine that gives logits and is no ablation, or why it could not be measured."""
    readable = [peer for peer in peers if isinstance(peer, Readable) and not peer.is_ablation]
    figures = {peer.name: LogitFigures() for peer in readable}
    failed: dict[str, str] = {}
    for done, ids in enumerate(windows):
        report("quality (windows)", done, len(windows))
        expected = trunk.causal_lm(torch.tensor([ids]), use_cache=False).logits[0]
        for peer in readable:
            if peer.name in failed:
                continue
            try:
                actual = torch.from_numpy(peer.logits(ids))
            except Exception as error:  # a foreign engine may raise anything
                failed[peer.name] = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            else:
                figures[peer.name].add(actual, expected, torch.tensor(ids[1:]))
    report("quality (windows)", len(windows), len(windows))
    return {peer.name: failed.get(peer.name) or _quality(figures[peer.name], peer.size) for peer in readable}


def _quality(figures: LogitFigures, size: int) -> Quality:
    kl = torch.cat(figures.kl)
    positions, equal = figures.top1(0)
    perplexity, reference = (float(torch.tensor(nll / figures.targets).exp()) for nll in figures.nll)
    return Quality(
        mean_kl=float(kl.mean()),
        p999_kl=float(kl.quantile(0.999)),
        top1=equal / positions,
        perplexity=perplexity,
        reference_perplexity=reference,
        size=size,
    )

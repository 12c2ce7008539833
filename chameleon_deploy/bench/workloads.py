"""The cases that `bench` times: the same work by the bundle and by its peers, checked against the reference."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from chameleon_deploy.bench.peers import ADAPT, DECODE, PREFILL, Peer, Rows
from chameleon_deploy.bench.peers.bundle import OneCallPerSet
from chameleon_deploy.bench.timing import Case, Contestant, Part
from chameleon_deploy.reference import inference
from chameleon_deploy.reference.checkpoint import Checkpoint
from chameleon_deploy.reference.inference import RowLogits
from chameleon_deploy.reference.model import Trunk
from chameleon_deploy.reference.python_corpus import KINDS, python_texts
from chameleon_deploy.runtime import Runtime

CANDIDATES = 4  # times as many texts as needed, to choose from by their clusters
# Limits of log-probabilities: of the largest difference in fp32, of the root mean square otherwise. They catch wrong
# work; quality.py measures how good right work is. The coarsest int8 engine measured on a pretrained model has 0.3.
BOUNDS = {"fp32": 5e-4, "fp16": 0.02, "bf16": 0.1, "int8": 0.5, "int4": 1.0}


class Workloads:
    """Cases for one bundle and its peers, on texts of one length.

    peers  the first is the baseline: the bundle as users run it
    """

    def __init__(self, runtime: Runtime, checkpoint: Checkpoint, peers: Sequence[Peer]) -> None:
        self._runtime, self._checkpoint, self._peers = runtime, checkpoint, peers
        self._row_logits = RowLogits(checkpoint)

    def scoring(self, rows: Rows) -> Case:
        """Time the log-probabilities of whole texts, clustering and hypernetwork included."""

        def engine(peer: Peer) -> Contestant:
            return Contestant(
                lambda lap: peer.score(rows),
                lambda scores: deviation(peer, scores - self._expected_scores(rows, peer)),
                BOUNDS[peer.precision],
            )

        batch, width = len(rows), len(rows[0])
        whole = Part("scoring", f"scoring {batch}x{width}", batch * width, "token", batch, width)
        return Case(whole, {peer.name: engine(peer) for peer in self._peers if peer.scores}, self._peers[0].name)

    def generation(self, rows: Rows, num_tokens: int) -> Case:
        """Time prompts to their first tokens, clustering and hypernetwork included, then cached steps."""
        batch, width, steps = len(rows), len(rows[0]), num_tokens - 1
        clusters = len(set(self._runtime.adapt(rows).factors.factor_ids.tolist()))
        mixed = f", {clusters} cluster{'s' * (clusters > 1)}"

        def part(kind: str, name: str, units: int, unit: str, laps: tuple[str, ...] = ()) -> Part:
            return Part(kind, name, units, unit, batch, width, num_tokens, laps)

        return Case(
            part("generation", f"prefill {batch}x{width} + {num_tokens} tokens{mixed}", batch * num_tokens, "token"),
            self._generating(lambda: rows, num_tokens, separate=clusters > 1),
            self._peers[0].name,
            [
                part("adaptation", f"adapt {batch}x{width}{mixed}", 1, "batch", (ADAPT,)),
                part("prefill", f"prefill {batch}x{width} + first token", batch * width, "token", (ADAPT, PREFILL)),
                part("decode", f"decode, batch {batch}, past {width}{mixed}", steps, "step", (DECODE,)),
            ],
        )

    def first_token(self, ids: Sequence[int]) -> Case:
        """Time one text to its first token, tokenising included."""
        tokenizer = self._runtime.tokenizer
        text = tokenizer.decode(ids)

        def encode() -> Rows:
            return [encoding.ids for encoding in tokenizer.encode_batch([text], add_special_tokens=False)]

        width = len(encode()[0])
        whole = Part("first_token", f"time to first token, text of {width} tokens", 1, "text", 1, width, 1)
        return Case(whole, self._generating(encode, 1, separate=False), self._peers[0].name)

    def _generating(self, rows: Callable[[], Rows], num_tokens: int, separate: bool) -> dict[str, Contestant]:
        """Return a case of generation.

        separate  whether there are several clusters, to call one by one
        """

        def engine(peer: Peer) -> Contestant:
            return Contestant(
                lambda lap: peer.generate(rows(), num_tokens, lap),
                lambda chosen: deviation(peer, self._regrets(rows(), chosen, peer)),
                2 * BOUNDS[peer.precision],  # two logits, each with its own deviation
            )

        return {
            peer.name: engine(peer)
            for peer in self._peers
            if peer.generates and (separate or not isinstance(peer, OneCallPerSet))
        }

    def _expected_scores(self, rows: Rows, peer: Peer) -> Any:
        return np.array(
            [
                logits[:-1].log_softmax(-1).numpy()[np.arange(len(ids) - 1), ids[1:]]
                for ids, logits in zip(rows, self._reference(rows, rows, peer), strict=True)
            ]
        )

    def _regrets(self, rows: Rows, chosen: Any, peer: Peer) -> Any:
        """See `regrets`."""
        eos_token_id = self._runtime.manifest.model.eos_token_id
        return regrets(self._reference(rows, continued(rows, chosen), peer), chosen, eos_token_id)

    def _reference(self, prompts: Rows, rows: Rows, peer: Peer) -> Any:
        """Return logits [length, vocab] of every row, with factors made from the prompts, one row at a time."""
        mode = self._runtime.mode if peer.adapts else "none"
        adaptation = inference.adapt(self._checkpoint, prompts, mode)
        return (self._row_logits(ids, adaptation, row) for row, ids in enumerate(rows))


def continued(rows: Rows, chosen: Any) -> list[list[int]]:
    """Return the rows with all of their chosen tokens but the last."""
    if len(chosen) != len(rows):
        raise ValueError(f"{len(chosen)} rows for {len(rows)} prompts")
    return [[*ids, *tokens[:-1]] for ids, tokens in zip(rows, chosen.tolist(), strict=True)]


def regrets(reference: Iterable[Any], chosen: Any, eos_token_id: int) -> Any:
    """Return by how much the reference's logit of each chosen token is below its best, the end of text excluded.

    reference  logits [length, vocab] of each row of `continued`
    """
    found, num_tokens = np.empty(chosen.shape, np.float32), chosen.shape[1]
    for row, logits in enumerate(reference):
        asked = logits[-num_tokens:].numpy().copy()
        of_chosen = asked[np.arange(num_tokens), chosen[row]]
        asked[:, eos_token_id] = -np.inf
        found[row] = np.maximum(asked.max(1) - of_chosen, 0)
    return found


def deviation(peer: Peer, errors: Any) -> float:
    """Return what BOUNDS limits."""
    if peer.precision == "fp32":
        return float(np.abs(errors).max())
    return float(np.sqrt(np.square(errors, dtype=np.float64).mean()))


def text_rows(checkpoint: Checkpoint, batch: int, width: int) -> list[list[int]]:
    """Return stretches of real text of `width` tokens. Clusters take turns, so that a batch has as many as fit."""
    candidates = stretches(checkpoint.trunk, CANDIDATES * batch, width)
    of_cluster: dict[int, list[list[int]]] = {}
    for ids, cluster in zip(
        candidates, inference.adapt(checkpoint, candidates, "none").cluster_ids.tolist(), strict=True
    ):
        of_cluster.setdefault(cluster, []).append(ids)
    turns = itertools.zip_longest(*of_cluster.values())
    return [ids for turn in turns for ids in turn if ids is not None][:batch]


def stretches(trunk: Trunk, count: int, width: int) -> list[list[int]]:
    """Return stretches of text whose kinds take turns."""
    streams = []
    for kind in KINDS:
        encoded = trunk.tokenizer.encode_batch(python_texts(kind, 200), add_special_tokens=False)
        if stream := [i for encoding in encoded for i in encoding.ids]:
            streams.append(stream)
    rows = []
    for i in range(count):
        stream = streams[i % len(streams)]
        rows.append([stream[(i * width + j) % len(stream)] for j in range(width)])
    return rows

"""What `bench` times: the same work by the bundle and by its peers, and what the reference says of their results."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from chameleon_deploy.bench.peers import DECODE, PREFILL, Peer, Rows
from chameleon_deploy.bench.peers.bundle import OneCallPerCluster
from chameleon_deploy.bench.timing import Case, Engine, Part
from chameleon_deploy.reference import inference
from chameleon_deploy.reference.checkpoint import Checkpoint
from chameleon_deploy.reference.inference import RowLogits
from chameleon_deploy.reference.python_corpus import KINDS, python_texts
from chameleon_deploy.runtime import Runtime
from chameleon_deploy.runtime.device.cuda import ITEM_SIZES

CANDIDATES = 4  # times as many texts as are needed, to choose from by their clusters
# Of log-probabilities: the largest difference in fp32, elsewhere the root of the mean square.
BOUNDS = {"fp32": 5e-4, "fp16": 0.02, "bf16": 0.1, "int8": 0.1}


class Workloads:
    """Cases for one bundle and its peers, on texts of one length.

    peers  the first is the bundle as users run it
    """

    def __init__(self, runtime: Runtime, checkpoint: Checkpoint, peers: Sequence[Peer]) -> None:
        self._runtime, self._checkpoint, self._peers = runtime, checkpoint, peers
        self._row_logits = RowLogits(checkpoint)
        self._weights = _Weights(runtime)

    def scoring(self, rows: Rows) -> Case:
        """Log-probabilities of whole texts, clustering and hypernetwork included."""

        def engine(peer: Peer) -> Engine:
            return Engine(
                lambda lap: peer.score(rows),
                lambda scores: _deviation(peer, scores - self._expected_scores(rows, peer)),
                BOUNDS[peer.precision],
            )

        tokens = sum(map(len, rows))
        whole = Part(f"scoring {_shape(rows)}", tokens, "token", *self._weights.work(tokens, tokens))
        return Case(whole, {peer.name: engine(peer) for peer in self._peers if peer.scores})

    def generation(self, rows: Rows, num_tokens: int) -> Case:
        """Prompts to their first tokens, clustering and hypernetwork included, and on by cached steps."""
        batch, width, steps = len(rows), len(rows[0]), num_tokens - 1
        clusters = len(set(self._runtime.adapt(rows).factors.factor_ids.tolist()))
        mixed = f", {clusters} cluster{'s' * (clusters > 1)}"
        prefill = self._weights.work(batch * width, batch)
        decode = self._weights.work(steps * batch, steps * batch, passes=steps, cached=steps * batch * width)
        both = prefill[0] + decode[0], prefill[1] + decode[1]
        return Case(
            Part(f"prefill {_shape(rows)} + {num_tokens} tokens{mixed}", batch * num_tokens, "token", *both),
            self._generating(lambda: rows, num_tokens, separate=clusters > 1),
            {
                PREFILL: Part(f"prefill {_shape(rows)} + first token", batch * width, "token", *prefill),
                DECODE: Part(f"decode, batch {batch}, past {width}{mixed}", steps, "step", *decode),
            },
        )

    def first_token(self, ids: Sequence[int]) -> Case:
        """One text in, its first token out: tokenising included."""
        tokenizer = self._runtime.tokenizer
        text = tokenizer.decode(ids)

        def encode() -> Rows:
            return [encoding.ids for encoding in tokenizer.encode_batch([text], add_special_tokens=False)]

        width = len(encode()[0])
        whole = Part(f"time to first token, text of {width} tokens", 1, "text", *self._weights.work(width, 1))
        return Case(whole, self._generating(encode, 1, separate=False))

    def _generating(self, rows: Callable[[], Rows], num_tokens: int, separate: bool) -> dict[str, Engine]:
        """separate: whether there are clusters to call one by one."""

        def engine(peer: Peer) -> Engine:
            return Engine(
                lambda lap: peer.generate(rows(), num_tokens, lap),
                lambda chosen: _deviation(peer, self._regrets(rows(), chosen, peer)),
                2 * BOUNDS[peer.precision],  # two logits, each with its own deviation
            )

        return {
            peer.name: engine(peer)
            for peer in self._peers
            if peer.generates and (separate or not isinstance(peer, OneCallPerCluster))
        }

    def _expected_scores(self, rows: Rows, peer: Peer) -> Any:
        return np.array(
            [
                logits[:-1].log_softmax(-1).numpy()[np.arange(len(ids) - 1), ids[1:]]
                for ids, logits in zip(rows, self._reference(rows, rows, peer), strict=True)
            ]
        )

    def _regrets(self, rows: Rows, chosen: Any, peer: Peer) -> Any:
        """By how much the reference's logit of each chosen token falls short of its best, the end of text aside."""
        if chosen.shape[0] != len(rows):
            raise ValueError(f"{chosen.shape[0]} rows for {len(rows)} prompts")
        num_tokens = chosen.shape[1]
        whole = [[*ids, *tokens[:-1]] for ids, tokens in zip(rows, chosen.tolist(), strict=True)]
        regrets = np.empty(chosen.shape, np.float32)
        for row, logits in enumerate(self._reference(rows, whole, peer)):
            asked = logits[-num_tokens:].numpy().copy()
            of_chosen = asked[np.arange(num_tokens), chosen[row]]
            asked[:, self._runtime.manifest.model.eos_token_id] = -np.inf
            regrets[row] = np.maximum(asked.max(1) - of_chosen, 0)
        return regrets

    def _reference(self, prompts: Rows, rows: Rows, peer: Peer) -> Any:
        """Logits [length, vocab] of every row, with the factors that the prompts give, one row at a time."""
        mode = self._runtime.mode if peer.adapts else "none"
        adaptation = inference.adapt(self._checkpoint, prompts, mode)
        return (self._row_logits(ids, adaptation, row) for row, ids in enumerate(rows))


def _deviation(peer: Peer, errors: Any) -> float:
    if peer.precision == "fp32":
        return float(np.abs(errors).max())
    return float(np.sqrt(np.square(errors, dtype=np.float64).mean()))


def text_rows(checkpoint: Checkpoint, batch: int, width: int) -> list[list[int]]:
    """Stretches of real text of `width` tokens. Clusters take turns, so that a batch has as many as it has room for."""
    stretches = _stretches(checkpoint, CANDIDATES * batch, width)
    of_cluster: dict[int, list[list[int]]] = {}
    for ids, cluster in zip(
        stretches, inference.adapt(checkpoint, stretches, "none").cluster_ids.tolist(), strict=True
    ):
        of_cluster.setdefault(cluster, []).append(ids)
    turns = itertools.zip_longest(*of_cluster.values())
    return [ids for turn in turns for ids in turn if ids is not None][:batch]


def _stretches(checkpoint: Checkpoint, count: int, width: int) -> list[list[int]]:
    """Kinds of text take turns."""
    streams = []
    for kind in KINDS:
        encoded = checkpoint.trunk.tokenizer.encode_batch(python_texts(kind)[:200], add_special_tokens=False)
        if stream := [i for encoding in encoded for i in encoding.ids]:
            streams.append(stream)
    rows = []
    for i in range(count):
        stream = streams[i % len(streams)]
        rows.append([stream[(i * width + j) % len(stream)] for j in range(width)])
    return rows


class _Weights:
    """The matrices that the decoder's graph multiplies by, in bytes and numbers: what the floor is made of."""

    def __init__(self, runtime: Runtime) -> None:
        model, spec = runtime.manifest.model, runtime.manifest.graphs[runtime.graph]
        cached = next(tensor for tensor in spec.inputs if tensor.name.startswith("past_key_values."))
        self.cache_bytes = (
            ITEM_SIZES[cached.dtype] * 2 * model.num_layers * model.num_key_value_heads * model.head_dim
        )  # of a token
        self.bytes = self.of_tokens = self.of_positions = 0
        graph = ir.load(runtime.bundle.path / spec.file).graph
        chosen = {value for value in graph.inputs if value.name == "logits_positions"}  # and what comes of them
        for node in graph:
            if chosen.intersection(node.inputs):
                chosen.update(node.outputs)
        for value in graph.initializers.values():
            matrix, takers = value.const_value, list(value.consumers())
            if all(node.op_type == "DequantizeLinear" for node in takers):
                takers = [taker for node in takers for taker in node.outputs[0].consumers()]
            if matrix is None or len(matrix.shape) < 2 or all(node.op_type == "Gather" for node in takers):
                continue  # norms and biases are small, and of an embedding only the rows looked up are read
            self.bytes += matrix.nbytes
            if all(chosen.intersection(node.inputs) for node in takers):
                self.of_positions += matrix.size
            else:
                self.of_tokens += matrix.size

    def work(self, tokens: int, positions: int, passes: int = 1, cached: int = 0) -> tuple[float, float]:
        """Bytes to read and operations to do, for so many tokens, positions that get logits (behind the last attention
        others are of no use), and tokens read from the cache.

        Attention scores are left out: at these lengths they are a few percent.
        """
        operations = 2 * (self.of_tokens * tokens + self.of_positions * positions)
        return passes * self.bytes + cached * self.cache_bytes, operations


def _shape(rows: Rows) -> str:
    return f"{len(rows)}x{len(rows[0])}"

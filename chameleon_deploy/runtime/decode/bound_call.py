"""A call of a shared-cache decoder whose inputs and outputs are bound once: fill in the arrays, then run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from chameleon_deploy.contract.bundle import FloatArray, ModelSpec
from chameleon_deploy.contract.manifest import in_head
from chameleon_deploy.runtime.decode.session import run
from chameleon_deploy.runtime.factors import FactorSets, RowFactors

Array = npt.NDArray[Any]


class Graph(Protocol):
    """The decoder's graph and session that calls are made of.

    session    of the decoder
    ort_value  onnxruntime.OrtValue
    past       names of the cache's inputs, in the graph's order
    """

    session: Any
    ort_value: Any
    model: ModelSpec
    past: list[str]


class BoundCall:
    """One shape of call.

    input_ids, position_ids  int64 [batch, width]
    logits_positions         int64 [batch, positions]
    seqlens_k                int32 [batch]
    total_sequence_length    int32 []
    logits                   float32 [batch, num_logits, vocab]
    hidden_states            float32 [batch, positions, hidden], where there are no logits
    """

    def __init__(
        self, graph: Graph, batch: int, width: int, positions: int, num_logits: int, buffers: Sequence[Array] | Array,
        logits: FloatArray | None = None,
    ) -> None:  # fmt: skip
        """Allocate and bind the arrays.

        positions   positions of a row that get hidden states
        num_logits  how many of those get logits; 0 for hidden states only
        buffers     the cache, [batch, heads, capacity, head_dim] for each of graph.past
        logits      contiguous output memory; None allocates it
        """
        vocab_size = graph.model.vocab_size
        self.input_ids = np.zeros((batch, width), np.int64)
        self.position_ids = np.zeros((batch, width), np.int64)
        self.logits_positions = np.zeros((batch, positions), np.int64)
        self.factor_ids = np.zeros(batch, np.int64)
        self.seqlens_k = np.zeros(batch, np.int32)
        self.total_sequence_length = np.zeros((), np.int32)
        self.logits = np.empty((batch, num_logits, vocab_size), np.float32) if logits is None else logits
        self.hidden_states = np.empty((batch, 0 if num_logits else positions, graph.model.hidden_size), np.float32)
        self._session, self._binding, self._ort_value = graph.session, graph.session.io_binding(), graph.ort_value
        self._values: dict[str, Any] = {}  # an OrtValue shares its array's memory: keep both alive
        self._sets: FactorSets | None = None
        self._bind_inputs({
            "input_ids": self.input_ids,
            "position_ids": self.position_ids,
            "logits_positions": self.logits_positions,
            "num_logits": np.array([num_logits], np.int64),
            "seqlens_k": self.seqlens_k,
            "total_sequence_length": self.total_sequence_length,
            "factor_ids": self.factor_ids,
        })  # fmt: skip
        flat = self.logits.reshape(-1, vocab_size)  # the same memory
        name, array = ("logits", flat) if num_logits else ("hidden_states", self.hidden_states)
        self._bind_output(name, array)
        for past, buffer in zip(graph.past, buffers, strict=True):
            self._bind_inputs({past: buffer})
            self._binding.bind_ortvalue_output(past.replace("past_key_values", "present"), self._values[past])

    def bind_factors(self, factors: RowFactors) -> None:
        """Bind factors for the next runs. Sets that are bound already cost nothing."""
        self.factor_ids[:] = factors.factor_ids
        if factors.sets is not self._sets:
            self._bind_inputs(_inputs_of(factors.sets))
            self._sets = factors.sets

    def run(self) -> FloatArray:
        """Run the call.  -> logits [batch, num_logits, vocab], an array that the next run overwrites

        Raises GraphError.
        """
        run(self._session.run_with_iobinding, self._binding)
        return self.logits

    def _bind_inputs(self, arrays: Mapping[str, Any]) -> None:
        for name, array in arrays.items():
            self._values[name] = self._ort_value.ortvalue_from_numpy(array)
            self._binding.bind_ortvalue_input(name, self._values[name])

    def _bind_output(self, name: str, array: Array) -> None:
        self._values[name] = self._ort_value.ortvalue_from_numpy(array)
        self._binding.bind_ortvalue_output(name, self._values[name])


def _inputs_of(sets: FactorSets) -> dict[str, Any]:
    """Return factors in the shapes of a shared-cache decoder's inputs, and the factor set of each column: -1 if no set
    updates anything.
    """
    inputs = {
        n: array if in_head(n) else np.asarray(array).reshape(-1, array.shape[2]) for n, array in sets.tensors.items()
    }
    if not all(map(in_head, inputs)):
        rank = next(iter(sets.tensors.values())).shape[1]
        set_ids = np.full(len(sets), -1) if sets.updates_nothing else np.arange(len(sets))
        inputs["column_ids"] = np.repeat(set_ids, rank)
    return inputs

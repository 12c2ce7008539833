"""Low-rank updates of linear layers whose factors are inputs of the graph, with a factor set for each row.

As in the head (head.py) the sets are stacked, and between the two products each row keeps its own set's columns and
zeroes the others, so that rows of different sets share a call and no row copies a factor.

In a step the products are so small that every operator counts. Projections that are one matrix in the graph keep their
own products all the same: their factors are separate inputs, and to join them in every call costs more than it saves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir

from chameleon_deploy.contract.bundle import TargetSpec
from chameleon_deploy.export.graph import integer, integers, real

FactorInputs = tuple[ir.Value, ir.Value]  # A [factor_sets, rank, in], B [factor_sets, rank, out]
# Names by which passes find the second operand of an update's products, the factor set of each of their columns, and
# what is added to the products' input.
STACKED, COLUMN_IDS, SHIFT = ".stacked", "updates.column_ids", ".shift"
Part = tuple[str, int]  # a linear layer by its PEFT name, and its number of output channels


class Updates:
    """The updates of one graph's linear layers."""

    def __init__(
        self,
        op: Any,
        factor_ids: ir.Value,
        targets: Sequence[TargetSpec],
        factors: Mapping[str, FactorInputs],
        shifts: Mapping[str, ir.Value],
    ) -> None:
        """Take the inputs of the graph.

        factors  by target; layers that are not targets cost nothing
        shifts   [in], by target: what a layer's input lacks of the input that its factors expect (int8/basis.py)
        """
        self._op, self._factor_ids, self._factors, self._shifts = op, factor_ids, factors, shifts
        self._in_features = {target.name: target.in_features for target in targets}
        self._shared: dict[Any, Any] = {}  # values that several updates use

    def add(self, y: Any, x: Any, positions: ir.Value, parts: Sequence[Part]) -> Any:
        """Return the product y of x with the updates of its parts, which stand side by side in its channels.

        y, x       [batch, positions, channels]
        positions  an input [batch, positions]
        """
        adapted = [name for name, _ in parts if name in self._factors]
        if not adapted:
            return y
        op = self._op
        if shift := self._shifts.get(adapted[0]):
            unshifted = x
            x = self._once(("shifted", x), lambda: op.Add(unshifted, shift))
        updates = [self._update(x, positions, name, size) for name, size in parts]
        return op.Add(y, updates[0] if len(updates) == 1 else op.Concat(*updates, axis=2))

    def _update(self, x: Any, positions: ir.Value, name: str, size: int) -> Any:
        """Return the update of one layer [batch, positions, size]."""
        op = self._op
        if name not in self._factors:
            return self._once(("zeros", positions.name, size), lambda: self._zeros(positions, size))
        lora_A, lora_B = self._factors[name]
        columns = op.Transpose(op.Reshape(lora_A, integers(op, [-1, self._in_features[name]])), perm=[1, 0])
        rows = op.Reshape(lora_B, integers(op, [-1, size]))
        for value, factor in ((columns, lora_A), (rows, lora_B)):
            value.name = f"{factor.name}{STACKED}"
        products = op.Where(self._once("own", self._own), op.MatMul(x, columns), real(op, 0.0))
        return op.MatMul(products, rows)

    def _zeros(self, positions: ir.Value, size: int) -> Any:
        op = self._op
        return op.Expand(real(op, 0.0), op.Concat(op.Shape(positions), integers(op, [size]), axis=0))

    def _own(self) -> Any:
        """Return which columns of the stacked products are of a row's own set: bool [batch, 1, factor_sets*rank]."""
        op = self._op
        return op.Equal(op.Unsqueeze(self._factor_ids, [1, 2]), self._columns())

    def _columns(self) -> Any:
        op, (lora_A, _) = self._op, next(iter(self._factors.values()))
        num_sets, rank = op.Shape(lora_A, start=0, end=1), op.Shape(lora_A, start=1, end=2)
        sets = op.Unsqueeze(op.Range(integer(op, 0), op.Squeeze(num_sets), integer(op, 1)), [1])
        column_ids = op.Reshape(op.Expand(sets, op.Concat(num_sets, rank, axis=0)), [-1])
        column_ids.name = COLUMN_IDS
        return column_ids

    def _once(self, key: Any, make: Any) -> Any:
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]

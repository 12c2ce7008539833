"""Updates of the trunk as the rows of a call need them: none at all, one set for all rows, or each row's own set.

    no set        all column_ids are -1: every update is a zero, and none of its products runs
    one set       two products
    several sets  rows are put beside others of their set, [factor_sets, most rows of a set], and multiplied with that
                  set alone, not with all sets of which all but one are zeroed

In a step of several sets a product is of one row, which ONNX Runtime multiplies with a factor in its place; for several
rows it would copy the factor first.

Only updates are in branches, not what they are added to: a sum outside is written in place, and gives a row without an
update the same bits in all three, its product plus zero. A weight that two branches multiply would be packed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from chameleon_deploy.contract.manifest import in_head
from chameleon_deploy.export.graph import INT64, integer, integers, subgraph, take_nodes
from chameleon_deploy.export.low_rank import SHIFT


class _Rows(NamedTuple):
    """The sets of a call's rows.

    is_none  whether no row has an update, bool []
    is_one   whether there is one set, bool []
    members  the rows of each set, int64 [factor_sets, most]; any rows where it has fewer
    places   of each row among `members`, int64 [batch, 2]
    shapes   of factors by set, [factor_sets, 1, rank, width], by width
    """

    is_none: ir.Value
    is_one: ir.Value
    members: ir.Value
    places: ir.Value
    shapes: Mapping[int, ir.Value]


class _Layer(NamedTuple):
    """The factors of one linear layer, [columns, in] and [columns, out]."""

    lora_A: ir.Value
    lora_B: ir.Value


class _Sum(NamedTuple):
    """An Add of an update, whose parts stand side by side: of layers, or values that are zero."""

    node: ir.Node
    x: ir.Value
    parts: Sequence[_Layer | ir.Value]


def choose_updates(decoder: ir.Model) -> int:
    """Rewrite a decoder of `flatten_factors` in place. Returns the number of its updates' inputs, each of which has an
    If.
    """
    graph = decoder.graph
    sums: dict[ir.Value, list[_Sum]] = {}
    for node in graph:
        if found := _sum(node):
            sums.setdefault(found.x, []).append(found)
    if not sums:
        return 0
    rows = _rows(graph)
    for i, same_x in enumerate(sums.values()):
        name = f"updates.{i}"
        none = subgraph(graph, f"{name}.none", partial(_of_no_set, same_x))
        some = subgraph(graph, f"{name}.some", partial(_some, graph, name, rows, same_x))
        either = ir.node("If", [rows.is_none], {"then_branch": none, "else_branch": some}, num_outputs=len(same_x))
        graph.insert_before(same_x[0].node, either)
        for k, (value, total) in enumerate(zip(either.outputs, same_x, strict=True)):
            value.name = f"{name}.{k}"
            total.node.replace_input_with(1, value)
    RemoveUnusedNodesPass()(decoder)
    return len(sums)


def _sum(node: ir.Node) -> _Sum | None:
    """Return a node as the sum that low_rank.py builds, or None."""
    update: Any = node.inputs[1] if node.op_type == "Add" else None
    if update is None or (last := update.producer()) is None:
        return None
    products = list(last.inputs) if last.op_type == "Concat" else [update]
    read = [_factors(product) for product in products]
    x = next((found[0] for found in read if found), None)
    if x is None:
        return None
    return _Sum(node, x, [found[1] if found else product for found, product in zip(read, products, strict=True)])


def _factors(product: Any) -> tuple[ir.Value, _Layer] | None:
    """Return what an update's last product is made of: the input of its layer, and the factors."""
    matmul = product.producer()
    if matmul is None or matmul.op_type != "MatMul" or not str(matmul.inputs[1].name).endswith(".lora_B"):
        return None
    first = matmul.inputs[0].producer().inputs[1].producer()  # what Where keeps some columns of
    return first.inputs[0], _Layer(first.inputs[1].producer().inputs[0], matmul.inputs[1])


def _rows(graph: ir.Graph) -> _Rows:
    inputs = {str(value.name): value for value in graph.inputs}
    factor_ids, column_ids = inputs["factor_ids"], inputs["column_ids"]
    widths = sorted({_width(value) for name, value in inputs.items() if ".lora_" in name and not in_head(name)})

    def ahead(op: Any) -> list[Any]:
        last = op.ReduceMax(column_ids, keepdims=1)
        count = op.Add(last, integers(op, [1]))
        batch = op.Range(integer(op, 0), op.Squeeze(op.Shape(factor_ids)), integer(op, 1))
        sets = op.Unsqueeze(factor_ids, integers(op, [1]))
        # How many rows up to each have the set of another, [batch, batch]; on the diagonal, its own.
        so_far = op.CumSum(op.Cast(op.Equal(sets, factor_ids), to=INT64), integer(op, 1))
        own = op.GatherElements(so_far, op.Unsqueeze(batch, integers(op, [1])), axis=1)
        place, most = op.Sub(own, integer(op, 1)), op.ReduceMax(own, keepdims=0)
        flat_place = op.Squeeze(op.Add(op.Mul(sets, most), place), integers(op, [1]))  # [batch]
        places = op.Range(integer(op, 0), op.Mul(op.Squeeze(count), most), integer(op, 1))
        is_there = op.Equal(op.Unsqueeze(places, integers(op, [1])), flat_place)  # [factor_sets * most, batch]
        members = op.ArgMax(op.Cast(is_there, to=ir.DataType.INT32), axis=1, keepdims=0)
        return [
            op.LessOrEqual(op.Squeeze(last), integer(op, -1)),
            op.LessOrEqual(op.Squeeze(last), integer(op, 0)),
            op.Reshape(members, op.Concat(count, op.Unsqueeze(most, integers(op, [0])), axis=0)),
            op.Concat(sets, place, axis=1),
            *(op.Concat(count, integers(op, [1, -1, width]), axis=0) for width in widths),
        ]

    nodes, (is_none, is_one, members, places, *shapes) = take_nodes(subgraph(graph, "updates", ahead))
    graph.insert_before(graph[0], nodes)
    return _Rows(is_none, is_one, members, places, dict(zip(widths, shapes, strict=True)))


def _width(factor: Any) -> int:
    """Return the channels of a factor [columns, channels]."""
    return int(factor.shape[1])


def _some(graph: ir.Graph, name: str, rows: _Rows, sums: Sequence[_Sum], op: Any) -> Any:
    one = subgraph(graph, f"{name}.one", partial(_of_one_set, sums))
    several = subgraph(graph, f"{name}.several", partial(_of_several_sets, rows, sums))
    updates = op.If(rows.is_one, then_branch=one, else_branch=several, _outputs=len(sums))
    return [updates] if len(sums) == 1 else updates


def _of_no_set(sums: Sequence[_Sum], op: Any) -> list[Any]:
    return [op.Constant(value=ir.tensor(np.zeros((1, 1, 1), np.float32))) for _ in sums]


def _of_one_set(sums: Sequence[_Sum], op: Any) -> Any:
    x = _input(op, sums[0].x)

    def update(layer: _Layer) -> Any:
        return op.MatMul(op.MatMul(x, op.Transpose(layer.lora_A, perm=[1, 0])), layer.lora_B)

    return [_side_by_side(op, total, update) for total in sums]


def _of_several_sets(rows: _Rows, sums: Sequence[_Sum], op: Any) -> Any:
    x = op.Gather(_input(op, sums[0].x), rows.members)  # [factor_sets, most, positions, in]

    def by_set(factor: ir.Value) -> Any:
        return op.Reshape(factor, rows.shapes[_width(factor)])

    def update(layer: _Layer) -> Any:
        products = op.MatMul(x, op.Transpose(by_set(layer.lora_A), perm=[0, 1, 3, 2]))
        return op.GatherND(op.MatMul(products, by_set(layer.lora_B)), rows.places)

    return [_side_by_side(op, total, update) for total in sums]


def _input(op: Any, x: Any) -> Any:
    """Return x, computed in the branch if it is a sum with a shift, which only updates read."""
    total = x.producer()
    is_shifted = total is not None and total.op_type == "Add" and str(total.inputs[1].name).endswith(SHIFT)
    return op.Add(*total.inputs) if is_shifted else x


def _side_by_side(op: Any, total: _Sum, update: Callable[[_Layer], Any]) -> Any:
    """Return the updates of a sum's parts [batch, positions, channels]."""
    parts = [update(part) if isinstance(part, _Layer) else part for part in total.parts]
    return parts[0] if len(parts) == 1 else op.Concat(*parts, axis=2)

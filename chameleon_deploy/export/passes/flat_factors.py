"""Factors of the trunk as the stack that is multiplied, [columns, width] with columns = factor_sets * rank.

Other graphs take [factor_sets, rank, width] and reshape every factor in every step: no arithmetic, but calls of an
operator that are a fifth of the time of all updates. `column_ids` replaces the axis of the sets.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from chameleon_deploy.contract.manifest import in_head
from chameleon_deploy.export.graph import INT64
from chameleon_deploy.export.low_rank import COLUMN_IDS


def flatten_factors(decoder: ir.Model) -> int:
    """Rewrite a decoder in place. Returns the number of factors, which are inputs of two axes afterwards.

    column_ids  int64 [columns], the factor set of each column: a new input, if there are any
    """
    graph = decoder.graph
    factors = [value for value in graph.inputs if ".lora_" in (name := str(value.name)) and not in_head(name)]
    if not factors:
        return 0
    computed = next(value for node in graph for value in node.outputs if value.name == COLUMN_IDS)
    column_ids = ir.Value(name="column_ids", shape=ir.Shape(["columns"]), type=ir.TensorType(INT64))
    ir.convenience.replace_all_uses_with(computed, column_ids)
    graph.inputs.append(column_ids)
    RemoveUnusedNodesPass()(decoder)
    for factor in factors:
        ((reshape, _),) = factor.uses()
        ir.convenience.replace_all_uses_with(reshape.outputs[0], factor)
        factor.shape = ir.Shape(["columns", *(factor.shape or [])[2:]])
    RemoveUnusedNodesPass()(decoder)
    return len(factors)

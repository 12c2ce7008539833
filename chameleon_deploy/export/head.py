"""The linear head and its low-rank update, with a factor set for each row.

The update of rows with different factor sets takes two plain matrix products: the sets are stacked into
[factor_sets*rank, hidden] and [factor_sets*rank, vocab], and between the two products each row keeps its own set's
columns and zeroes the others. No row copies lora_B.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from chameleon_deploy.export.graph import integer, integers, real, soft_cap
from chameleon_deploy.export.low_rank import FactorInputs
from chameleon_deploy.reference.families.spec import DecoderSpec

# The inputs by which passes find a head: its hidden states [batch, positions, hidden], and the factor set of each
# position.
HIDDEN_STATES, FACTOR_IDS = "head.hidden_states", "head.factor_ids"


def build_head(
    op: Any,
    hidden: Any,
    weight: ir.Value,
    factor_ids: ir.Value,
    factors: FactorInputs | None,
    spec: DecoderSpec,
) -> Any:
    """Return h W^T + (h A^T) B, each row with its own factor set, with the model's soft cap.  [batch, positions,
    hidden] -> [.., vocab]

    factors  A and B; None for a head without an update
    """
    hidden_size, vocab_size = spec.hidden_size, spec.vocab_size
    hidden.name = HIDDEN_STATES
    h = op.Reshape(hidden, [-1, hidden_size])  # one row per position: [n, hidden]
    base = op.Gemm(h, weight, transB=1)
    if factors is None:
        base = soft_cap(op, base, spec.logits_cap)
        return op.Reshape(base, op.Concat(op.Shape(hidden, start=0, end=2), integers(op, [vocab_size]), axis=0))
    lora_A, lora_B = factors
    products = op.Gemm(h, op.Reshape(lora_A, [-1, hidden_size]), transB=1)  # [n, factor_sets*rank]
    num_sets, rank = op.Squeeze(op.Shape(lora_A, start=0, end=1)), op.Shape(lora_A, start=1, end=2)
    sets = op.Unsqueeze(op.Range(integer(op, 0), num_sets, integer(op, 1)), [1])
    columns = op.Reshape(op.Expand(sets, op.Concat(op.Shape(lora_A, start=0, end=1), rank, axis=0)), [1, -1])
    positions = op.Shape(hidden, start=0, end=2)
    rows = op.Expand(op.Unsqueeze(factor_ids, [1]), positions)
    rows.name = FACTOR_IDS
    own = op.Equal(op.Reshape(rows, [-1, 1]), columns)  # [n, factor_sets*rank]
    products = op.Where(own, products, real(op, 0.0))
    logits = soft_cap(op, op.Gemm(products, op.Reshape(lora_B, [-1, vocab_size]), base), spec.logits_cap)
    return op.Reshape(logits, op.Concat(positions, integers(op, [vocab_size]), axis=0))

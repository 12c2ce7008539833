"""What every family's trunk is given and gives. One module for each family: gpt2.py, llama.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import onnx_ir as ir

from chameleon_deploy.bundle import ModelSpec
from chameleon_deploy.export.weights import GraphWeights
from chameleon_deploy.reference.model import Trunk

# Final hidden states [batch, positions, hidden], and key and value of every layer.
TrunkOutputs = tuple[Any, Sequence[tuple[Any, Any]]]


@dataclass(frozen=True)
class TrunkInputs:
    """input_ids, position_ids  int64 [batch, sequence]
    attention_mask           int64 [batch, past + sequence]
    logits_positions         int64 [batch, positions], which of the sequence get final hidden states
    past                     key and value of every layer, float32 [batch, key-value heads, past, head_dim]
    """

    input_ids: ir.Value
    position_ids: ir.Value
    attention_mask: ir.Value
    logits_positions: ir.Value
    past: Sequence[tuple[ir.Value, ir.Value]]


def at_positions(op: Any, x: Any, positions: ir.Value) -> Any:
    """[batch, sequence, channels], [batch, positions] -> [batch, positions, channels]"""
    return op.GatherND(x, op.Unsqueeze(positions, [2]), batch_dims=1)


class BuildTrunk(Protocol):
    """From token ids to the final hidden states (after the last norm): the operators of `Trunk.hidden_states`.

    Behind the last attention no position depends on another: the rest of that layer is for `logits_positions` alone.

    token_embedding  the table [vocab, hidden], written already because the head may share it
    trunk            the reference: its configuration
    """

    def __call__(
        self,
        op: Any,
        weights: GraphWeights,
        token_embedding: ir.Value,
        inputs: TrunkInputs,
        model: ModelSpec,
        trunk: Trunk,
    ) -> TrunkOutputs: ...

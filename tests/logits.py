"""The reference's logits of one text."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from chameleon_deploy.reference.checkpoint import Checkpoint
from chameleon_deploy.reference.inference import ReferenceAdaptation, RowLogits


def row_logits(checkpoint: Checkpoint, ids: Sequence[int], adaptation: ReferenceAdaptation, row: int) -> Tensor:
    """Logits [sequence, vocab] of `ids` with the factors of a row."""
    return RowLogits(checkpoint)(ids, adaptation, row)

"""Which checks of a verification a bundle misses, and faults of a cache that it must miss some by."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chameleon_deploy import Runtime
from chameleon_deploy.reference.checkpoint import Checkpoint
from chameleon_deploy.verify.run import verify_bundle


def quiet(what: str, done: int, total: int) -> None:
    pass


def missed(bundle: Path, checkpoint: Checkpoint) -> set[str]:
    checks, _ = verify_bundle(bundle, checkpoint, None, 1, quiet)
    return {check.name for check in checks if not check.passed}


def _position_early(cache: Any) -> None:
    """The next token overwrites the last."""
    cache.lengths = cache.lengths - 1


def _past_dropped(cache: Any) -> None:
    """The first half of what every row has read."""
    for buffer in cache.buffers:
        for row, length in enumerate(cache.lengths.tolist()):
            buffer[row, :, : length // 2] = 0


def _other_row(cache: Any) -> None:
    for buffer in cache.buffers:
        buffer[:] = np.roll(buffer, 1, axis=0)


CACHE_FAULTS: tuple[Callable[[Any], None], ...] = (_position_early, _past_dropped, _other_row)


def damage_cache(runtime: Runtime, fault: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a runtime's decoder return a damaged cache after every prompt."""
    prefill = runtime.decoder.prefill

    def damaged(*arguments: Any) -> Any:
        logits, cache = prefill(*arguments)
        fault(cache)
        return logits, cache

    monkeypatch.setattr(runtime.decoder, "prefill", damaged)

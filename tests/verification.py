"""Which checks of a verification a bundle misses, and faults of a cache that it must miss some by."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chameleon_deploy import Runtime
from chameleon_deploy.reference.source import Source
from chameleon_deploy.runtime.decode.slots import Slots
from chameleon_deploy.verify import run
from chameleon_deploy.verify.run import VerifyOptions, verification_rows, verify_bundle


def quiet(what: str, done: int, total: int) -> None:
    pass


def missed(bundle: Path, checkpoint: Source) -> set[str]:
    """Return the names of the checks that a bundle misses, of all checks on the long text and 8 others."""

    def few(*options: Any) -> list[list[int]]:
        *others, longest = verification_rows(*options)
        return [*others[:8], longest]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "verification_rows", few)
        checks, _ = verify_bundle(bundle, checkpoint, quiet, VerifyOptions(threads=1))
    return {check.name for check in checks if not check.passed}


def _position_early(slots: Slots) -> None:
    """The next token overwrites the last."""
    slots.lengths -= 1


def _past_dropped(slots: Slots) -> None:
    """The first half of what every row has read."""
    for row, length in enumerate(slots.lengths.tolist()):
        slots._cache[:, row, :, : length // 2] = 0


def _other_row(slots: Slots) -> None:
    slots._cache[:] = np.roll(slots._cache, 1, axis=1)


CACHE_FAULTS: tuple[Callable[[Slots], None], ...] = (_position_early, _past_dropped, _other_row)


def damage_cache(runtime: Runtime, fault: Callable[[Slots], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Damage what a runtime's decoder has read of every prompt, before the first step."""
    step, damaged = Slots.step, list[Slots]()

    def first_damaged(slots: Slots, token_ids: Any, factors: Any) -> Any:
        if not any(slots is each for each in damaged):
            damaged.append(slots)
            fault(slots)
        return step(slots, token_ids, factors)

    monkeypatch.setattr(Slots, "step", first_damaged)

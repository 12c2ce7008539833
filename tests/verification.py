"""Which checks of a verification a bundle misses."""

from __future__ import annotations

from pathlib import Path

from chameleon_deploy.reference.checkpoint import Checkpoint
from chameleon_deploy.verify.run import verify_bundle


def quiet(what: str, done: int, total: int) -> None:
    pass


def missed(bundle: Path, checkpoint: Checkpoint) -> set[str]:
    checks, _ = verify_bundle(bundle, checkpoint, None, 1, quiet)
    return {check.name for check in checks if not check.passed}

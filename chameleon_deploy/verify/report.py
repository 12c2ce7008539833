"""The result of a verification: a table of all checks, and an error that names the missed ones."""

from __future__ import annotations

from chameleon_deploy.terminal.console import CheckFailedError
from chameleon_deploy.terminal.table import Sheet
from chameleon_deploy.verify.gates import Check


def check_sheet(checks: list[Check]) -> Sheet:
    rows = [
        [
            check.graph,
            check.name,
            f"{check.value:.3g}",
            "" if check.limit is None else f"{'>=' if check.at_least else '<='} {check.limit:g}",
            "ok" if check.passed else "MISSED",
            check.note,
        ]
        for check in checks
    ]
    missed = [number for number, check in enumerate(checks) if not check.passed]
    return Sheet(["graph", "check", "figure", "limit", "result", "note"], rows, marked=missed)


def require_passed(checks: list[Check]) -> None:
    """Raise CheckFailedError with the names of the missed checks, if any."""
    missed = [f"{check.graph}: {check.name}" for check in checks if not check.passed]
    if missed:
        raise CheckFailedError(f"{len(missed)} of {len(checks)} checks missed: {'; '.join(missed)}")

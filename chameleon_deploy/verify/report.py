"""The result of a verification as a table of all checks."""

from __future__ import annotations

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

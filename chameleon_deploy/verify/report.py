"""The result of a verification for people: a table of all checks, and an error that names the missed ones."""

from __future__ import annotations

from rich.table import Table

from chameleon_deploy.console import CheckFailedError
from chameleon_deploy.verify.gates import Check


def check_table(checks: list[Check]) -> Table:
    table = Table("graph", "check", "figure", "limit", "", "note")
    for check in checks:
        limit = "" if check.limit is None else f"{'>=' if check.at_least else '<='} {check.limit:g}"
        mark = "[green]ok[/]" if check.passed else "[red]MISSED[/]"
        table.add_row(check.graph, check.name, f"{check.value:.3g}", limit, mark, check.note)
    return table


def require_passed(checks: list[Check]) -> None:
    missed = [f"{check.graph}: {check.name}" for check in checks if not check.passed]
    if missed:
        raise CheckFailedError(f"{len(missed)} of {len(checks)} checks missed: {'; '.join(missed)}")

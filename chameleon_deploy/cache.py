"""`python -m chameleon_deploy.cache`: list or delete the entries of this machine's cache."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from chameleon_deploy.errors import InputError
from chameleon_deploy.store import local_cache
from chameleon_deploy.store.local_cache import Stored
from chameleon_deploy.terminal import console
from chameleon_deploy.terminal.table import Sheet

DAY = 86_400  # seconds

app = typer.Typer(**console.SETTINGS, help="The local cache: TensorRT engines, shared weights, converted base models.")
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object per entry and line.")]


@app.command("list")
def list_entries(as_json: AsJson = False) -> None:
    """List the entries, most recently used first."""
    _print(local_cache.stored(), as_json)


@app.command()
def prune(
    max_bytes: Annotated[
        int | None, typer.Option(min=0, help="Keep the most recently used entries up to this total size.")
    ] = None,
    older_than: Annotated[
        float | None, typer.Option(min=0, help="Delete entries that were not used for this many days.", metavar="DAYS")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Delete old, large and incomplete entries and list what was deleted. They are built again when needed."""
    if max_bytes is None and older_than is None:
        raise InputError("nothing to delete: pass --older-than DAYS or --max-bytes N (0 deletes everything)")
    _print(local_cache.prune(max_bytes, None if older_than is None else older_than * DAY), as_json)


def _print(entries: Sequence[Stored], as_json: bool) -> None:
    if as_json:
        for entry in entries:
            print(json.dumps(_record(entry)))
        return
    total = f"{len(entries)} entries, {sum(entry.size for entry in entries) / 1e6:,.1f} MB"
    headers = ["kind", "entry", "key", "last used", "bytes"]
    console.show(Sheet(headers, [_row(entry) for entry in entries], str(local_cache.cache_root()), total))


def _row(entry: Stored) -> list[str]:
    used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.last_used))
    key = "incomplete" if entry.key is None else ", ".join(f"{k} {v[:40]}" for k, v in entry.key.items())
    return [entry.kind, entry.path.name, key, used, f"{entry.size:,}"]


def _record(entry: Stored) -> dict[str, Any]:
    return {
        "kind": entry.kind,
        "path": str(entry.path),
        "key": entry.key,
        "bytes": entry.size,
        "last_used": entry.last_used,
    }


if __name__ == "__main__":
    console.run(app)

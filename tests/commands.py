"""Commands as users run them: real processes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest


def run(
    *arguments: Any, program: str | None = None, env: Mapping[str, str | None] | None = None, **options: Any
) -> subprocess.CompletedProcess[str]:
    """A module's command, or a program's. env: changes to the environment, None unsets; options: of subprocess.run."""
    start = [program] if program else [sys.executable, "-m"]
    changed = {name: value for name, value in {**os.environ, **(env or {})}.items() if value is not None}
    return subprocess.run(
        [*start, *map(str, arguments)], **{"capture_output": True, **options}, env=changed, text=True, check=False
    )


def find_program(*names: str, install: str) -> str:
    """A program: where it is missing this is a failure in CI, and a skip with its reason elsewhere."""
    for name in names:
        if (program := shutil.which(name)) is not None:
            return program
    reason = f"no {names[0]}: {install}"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)

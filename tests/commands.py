"""Commands as users run them: real processes."""

from __future__ import annotations

import subprocess
import sys
from typing import Any


def run(*arguments: Any, program: str | None = None) -> subprocess.CompletedProcess[str]:
    start = [program] if program else [sys.executable, "-m"]
    return subprocess.run([*start, *map(str, arguments)], capture_output=True, text=True, check=False)

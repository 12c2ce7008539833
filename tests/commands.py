"""Commands as users run them: real processes, or without their seconds of imports in this one."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest

from chameleon_deploy import cli
from chameleon_deploy.terminal import console


def run(
    *arguments: Any, program: str | None = None, env: Mapping[str, str | None] | None = None, **options: Any
) -> subprocess.CompletedProcess[str]:
    """A module's command, or a program's. env: changes to the environment, None unsets; options: of subprocess.run."""
    start = [program] if program else [sys.executable, "-m"]
    changed = {name: value for name, value in {**os.environ, **(env or {})}.items() if value is not None}
    return subprocess.run(
        [*start, *map(str, arguments)], **{"capture_output": True, **options}, env=changed, text=True, check=False
    )


def call(module: str, *arguments: Any) -> subprocess.CompletedProcess[str]:
    """A module's command in this process: for what does not depend on how a process starts and ends."""
    output, errors = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    command = (
        cli.load(module.removeprefix("chameleon_deploy."))
        if module.startswith("chameleon_deploy.")
        else console.make_command(importlib.import_module(module).main)
    )
    argv, sys.argv = sys.argv, [module, *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            console.run_command(command)
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        sys.argv = argv
    texts = [stream.buffer.getvalue().decode() for stream in (output, errors)]
    return subprocess.CompletedProcess(argv, code, *texts)


def find_program(*names: str, install: str) -> str:
    """A program: where it is missing this is a failure in CI, and a skip with its reason elsewhere."""
    for name in names:
        if (program := shutil.which(name)) is not None:
            return program
    reason = f"no {names[0]}: {install}"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)

"""The repository keeps its shape: what stands where, and what imports what."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

HEAVY = ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "sklearn", "typer", "rich")


@pytest.mark.parametrize("directory", ["export", "runtime"])
def test_no_python_in_the_top_level_pipeline_directories(directory: str) -> None:
    assert not list((REPOSITORY / directory).rglob("*.py"))


@pytest.mark.parametrize(
    "statement", ["import chameleon_deploy", "import chameleon_deploy.runtime, chameleon_deploy.bundle"]
)
def test_importing_the_library_loads_nothing_heavy(statement: str) -> None:
    code = f"{statement}\nimport sys\nprint(sorted({HEAVY!r} & sys.modules.keys()))".replace(
        f"{HEAVY!r}", f"set({HEAVY!r})"
    )
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert output.strip() == "[]"


def test_loading_and_generating_loads_nothing_heavy(bundle: Path) -> None:
    code = (
        "import sys, chameleon_deploy\n"
        "chameleon_deploy.load(sys.argv[1]).generate(['The river'], max_new_tokens=2)\n"
        f"print(sorted(set({HEAVY!r}) & sys.modules.keys()))"
    )
    output = subprocess.run(
        [sys.executable, "-c", code, str(bundle)], check=True, capture_output=True, text=True
    ).stdout
    assert output.strip() == "[]"


def test_import_rules() -> None:
    program = Path(sys.executable).with_name("lint-imports")
    result = subprocess.run([program, "--no-cache"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


def test_base_install_stays_small() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    names = {dependency.split(">")[0] for dependency in project["dependencies"]}
    assert names == {"msgspec", "numpy", "safetensors", "tokenizers"}


def test_no_test_file_imports_another() -> None:
    importing = [
        str(file.relative_to(REPOSITORY))
        for file in (REPOSITORY / "tests").rglob("*.py")
        if re.search(r"^\s*from tests\.(\w+\.)*test_\w+ import", file.read_text(), re.MULTILINE)
    ]
    assert not importing

"""The repository keeps its shape: what stands where, and what imports what."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from chameleon_deploy.terminal.commands import COMMANDS, module_of
from tests.conftest import REPOSITORY

HEAVY = ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "sklearn", "typer", "rich")


@pytest.mark.parametrize("directory", ["export", "runtime"])
def test_no_python_in_the_top_level_pipeline_directories(directory: str) -> None:
    top = REPOSITORY / directory
    # runtime/build is ignored by git: `make processors` unpacks an interpreter there
    assert not [file for file in top.rglob("*.py") if file.relative_to(top).parts[0] != "build"]


def test_at_the_root_stand_the_public_surface_and_commands_alone() -> None:
    modules = {file.stem for file in (REPOSITORY / "chameleon_deploy").glob("*.py")}
    commands = {module_of(name).removeprefix("chameleon_deploy.") for name in COMMANDS}
    assert modules <= {"__init__", "errors", "directory", "cli", *commands}


@pytest.mark.parametrize(
    "statement", ["import chameleon_deploy", "import chameleon_deploy.runtime, chameleon_deploy.contract.bundle"]
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


PACKAGE = REPOSITORY / "chameleon_deploy"
MOST_PARAMETERS, SMALL = 7, 60
# The list's, the queue's and ONNX Runtime's own methods, which our functions of these names have nothing to do with.
FOREIGN = {"append", "pop", "put", "run"}
Function = ast.FunctionDef | ast.AsyncFunctionDef


def parsed(*folders: Path) -> dict[Path, ast.Module]:
    return {file: ast.parse(file.read_text()) for folder in folders for file in sorted(folder.rglob("*.py"))}


def long_signatures(modules: dict[Path, ast.Module]) -> Iterator[str]:
    """Functions of too many parameters. A command has one for each of its options: typer reads them off `main`."""
    for file, module in modules.items():
        for node in ast.walk(module):
            if isinstance(node, Function) and node.name != "main":
                arguments = node.args
                named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
                count = len([one for one in named if one.arg not in ("self", "cls")]) + (arguments.vararg is not None)
                if count > MOST_PARAMETERS:
                    yield f"{file.name}: {node.name} takes {count}"


def passed_none(modules: dict[Path, ast.Module]) -> Iterator[str]:
    """Calls of our own functions and classes that pass None by position."""
    nodes = [(file, node) for file, module in modules.items() for node in ast.walk(module)]
    own = {node.name for _, node in nodes if isinstance(node, Function | ast.ClassDef)} - FOREIGN
    for file, node in nodes:
        if isinstance(node, ast.Call) and any(isinstance(a, ast.Constant) and a.value is None for a in node.args):
            called = ast.unparse(node.func).rpartition(".")[2]
            if called in own:
                yield f"{file.name}: {called}"


def small_modules_of_one(modules: dict[Path, ast.Module]) -> set[str]:
    """Short modules that only one other imports, and that are no command."""
    named = {".".join(file.with_suffix("").relative_to(PACKAGE.parent).parts): file for file in modules}
    importers = defaultdict(set)
    for name, file in named.items():
        for node in ast.walk(modules[file]):
            if isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    full = f"{node.module}.{alias.name}"
                    importers[full if full in named else node.module].add(name)
    lines = {name: len(file.read_text().splitlines()) for name, file in named.items()}
    return {name for name in named if lines[name] < SMALL and len(importers[name]) == 1}


def test_functions_take_few_parameters(tmp_path: Path) -> None:
    assert list(long_signatures(parsed(PACKAGE, REPOSITORY / "benchmarks"))) == []
    names = "a, b, c, d, e, f, g, h"
    (tmp_path / "long.py").write_text(f"def main({names}): ...\n\n\ndef work(self, {names}): ...\n")
    assert list(long_signatures(parsed(tmp_path))) == ["long.py: work takes 8"]


def test_none_is_passed_by_name(tmp_path: Path) -> None:
    assert list(passed_none(parsed(PACKAGE, REPOSITORY / "benchmarks"))) == []
    (tmp_path / "none.py").write_text("def work(a): ...\n\n\nwork(None)\nwork(a=None)\ngetattr(work, 'a', None)\n")
    assert list(passed_none(parsed(tmp_path))) == ["none.py: work"]


def test_a_small_module_has_several_importers() -> None:
    # A family, a pass, an algorithm with a paper of its own, a graph and an engine that is compared with are each a
    # module, however small.
    exempt = tuple(
        f"chameleon_deploy.{name}" for name in (
            "reference.families.", "export.passes.", "export.int8.gptq", "export.readout", "bench.peers.",
        )
    )  # fmt: skip
    found = {name for name in small_modules_of_one(parsed(PACKAGE)) if not name.startswith(exempt)}
    assert found == set()
    assert "chameleon_deploy.export.passes.flat_logits" in small_modules_of_one(parsed(PACKAGE))


# Names of families, of their modules and of their matrices.
FAMILY_NAMES = re.compile(
    r"""["'](gpt2|llama|mistral|qwen[23]|granite|smollm3|gpt_neox|olmo2|phi3|gemma2|gemma3_text)["']"""
    r"""|c_attn|c_fc|c_proj|\bwte\b|\bwpe\b|\bln_[12f]\b|qkv_proj|gate_up_proj|down_proj|\bo_proj\b|query_key_value"""
    r"""|dense_|[qk]_norm|embed_(tokens|in)\b|layernorm|layer_norm\b|rotary_emb\b|\.h\.|transformer\.h|(model|neox)\.layers\."""
)


def family_names(module: Path) -> list[str]:
    """Lines of a module that name a family."""
    lines = module.read_text().splitlines()
    return [line for line in lines if FAMILY_NAMES.search(line) and not line.startswith("AUTHORS_BASE = ")]


def test_families_are_known_in_one_place() -> None:
    package = REPOSITORY / "chameleon_deploy"
    families = package / "reference" / "families"
    known = set(families.glob("*.py")) - {families / f"{name}.py" for name in ("__init__", "__main__", "spec")}
    known |= {package / "reference" / f"{name}.py" for name in ("gguf", "gguf_tokenizer")}  # names of that format
    known.add(package / "reference" / "sentence_encoder.py")  # of encoders
    assert all(map(family_names, known))
    assert {module: found for module in set(package.rglob("*.py")) - known if (found := family_names(module))} == {}


def test_a_family_named_elsewhere_is_found(tmp_path: Path) -> None:
    module = tmp_path / "rotation.py"
    for line in ('if model.architecture == "gpt2":', 'AFTER_NORM = ("c_attn.weight", HEAD)', 'FIRST = ".h.0."'):
        module.write_text(f"import copy\n{line}\n")
        assert family_names(module) == [line]


def test_no_test_file_imports_another() -> None:
    importing = [
        str(file.relative_to(REPOSITORY))
        for file in (REPOSITORY / "tests").rglob("*.py")
        if re.search(r"^\s*from tests\.(\w+\.)*test_\w+ import", file.read_text(), re.MULTILINE)
    ]
    assert not importing


def test_the_workflow_runs_what_ci_runs() -> None:
    workflow = yaml.safe_load((REPOSITORY / ".github" / "workflows" / "ci.yml").read_text())
    commands = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    assert ".ci/run" in commands
    assert os.access(REPOSITORY / ".ci" / "run", os.X_OK)


@pytest.mark.parametrize(("target", "extras"), [("demo", ["cpu,export,serve"]), ("test", ["cpu,export,serve", "dev"])])
def test_a_clone_installs_what_a_target_needs(target: str, extras: list[str], tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml"):
        (tmp_path / name).write_text((REPOSITORY / name).read_text())
    ran = subprocess.run(["make", "--dry-run", target], cwd=tmp_path, capture_output=True, text=True, check=True)
    installed = re.findall(r"--editable '\.\[(.*)\]'", ran.stdout)
    assert len(installed) == len(extras)
    assert all(set(wanted.split(",")) <= set(found.split(",")) for wanted, found in zip(extras, installed, strict=True))
    assert ("dev" in installed[-1].split(",")) == (target == "test")

"""The pages name commands, options, files and limits that exist, and their Python snippets run as printed."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import chdir
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from chameleon_deploy import errors
from chameleon_deploy.export.exporter import export_bundle
from chameleon_deploy.reference.checkpoint import load_checkpoint
from chameleon_deploy.terminal import console
from chameleon_deploy.terminal.commands import COMMANDS
from chameleon_deploy.verify import checkpoint_checks, promises, run
from chameleon_deploy.verify.gates import GATES, TENSORRT_FP32, Gate
from chameleon_deploy.verify.wrong_factors import CAUGHT
from tests.adapters import save_adapter
from tests.commands import call

REPOSITORY = Path(__file__).parent.parent
PAGES = sorted(
    [*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/**/*.md"), *REPOSITORY.glob("[a-z]*/README.md")],
    key=lambda page: page.relative_to(REPOSITORY).as_posix(),
)
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")


def code(text: str) -> Iterator[str]:
    """Yield the lines of a page's code, without comments and with continued lines joined, and its code spans."""
    text = re.sub(r"\\\n\s*", "", text)
    for line in re.sub(r"^ {4}|^```\w*$", "\t", text, flags=re.MULTILINE).split("\n"):
        yield from [line.split(" #")[0]] if line.startswith("\t") else re.findall(r"`([^`]+)`", line)


def unknown_commands(text: str) -> list[str]:
    """Return the modules, subcommands and options that a page names and the package does not have."""
    unknown = []
    for line in code(text):
        for module, arguments in re.findall(r"python -m ((?:benchmarks|chameleon_deploy|tests)\.[\w.]+)([^;&]*)", line):
            path = REPOSITORY / module.replace(".", "/")
            if not path.with_suffix(".py").is_file() and not (path / "__main__.py").is_file():
                unknown.append(module)
            elif not module.startswith("tests"):
                known = options_of(module)
                unknown += [f"{module} {option}" for option in OPTION.findall(arguments) if option not in known]
        for command in re.findall(r"(?<![\w/.-])chameleon-deploy ([a-z-]+)", line):
            unknown += [] if command in COMMANDS else [f"chameleon-deploy {command}"]
    return unknown


def options_of(module: str) -> set[str]:
    """Return the long options of a command, those of its subcommands included."""
    found: Any = importlib.import_module(module)
    if hasattr(found, "__path__"):
        found = importlib.import_module(f"{module}.__main__")
    command = console.make_command(getattr(found, "app", None) or found.main)
    commands = [command, *getattr(command, "commands", {}).values()]
    return {"--help", *(name for one in commands for parameter in one.params for name in options(parameter))}


def options(parameter: Any) -> list[str]:
    return [*parameter.opts, *parameter.secondary_opts]


def unknown_targets(text: str, makefile: str) -> list[str]:
    """Return the targets of `make` that a page names and the Makefile does not have."""
    named = [target for line in code(text) for target in re.findall(r"(?:^|\t)\s*make ([a-z]\w*)", line)]
    return [target for target in named if not re.search(rf"^{target}:", makefile, re.MULTILINE)]


def dead_links(page: Path) -> list[str]:
    """Return the links of a page to files or headings that do not exist."""
    dead = []
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)", page.read_text()):
        file = (page.parent / target) if target else page
        if not file.exists() or (anchor and anchor not in headings(file.read_text())):
            dead.append(f"{target}#{anchor}" if anchor else target)
    return dead


def missing_files(text: str) -> list[str]:
    """Return the files and folders in code spans that neither the repository nor the package has."""
    named = re.findall(r"`([\w.]+/(?:[\w.]+/)*(?:[\w.]+\.py)?)`", text)
    places = (REPOSITORY, REPOSITORY / "chameleon_deploy")
    return [name for name in named if not any((place / name).exists() for place in places)]


def headings(text: str) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def run_snippets(text: str, directory: Path) -> tuple[list[str], list[str]]:
    """Run the Python blocks of a page as one program; return the printed lines and those that the page shows."""
    program = "\n".join(re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    ran = subprocess.run(
        [sys.executable, "-c", program], cwd=directory, capture_output=True, text=True, timeout=60, check=False
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.splitlines(), [line[2:] for line in program.split("\n") if line.startswith("# ")]


def documented_gates(text: str) -> dict[str, Gate]:
    """Return the gates in the table of a page, by row; the tolerances, which it leaves out, are those of the code."""
    head, _, *rows = [
        [cell.strip().lower() for cell in line.split("|")[1:-1]]
        for line in re.findall(r"^\|.*(?:\n\|.*)*", text[text.index("Numeric gates") :], re.MULTILINE)[0].split("\n")
    ]
    columns = [next((i for i, name in enumerate(head) if word in name), 0) for word in ("logit", "top", "kl", "perpl")]
    found = {}
    for row in rows:
        logit, top, kl, perplexity = (numbers(row[i]) for i in columns)
        code = gate_of_row(row[0])
        found[row[0]] = replace(
            code,
            max_abs_logit=logit[0] if logit else None,
            top1_agreement=1.0 if len(top) == 1 else top[0],
            top1_gap=top[-1],
            kl_mean=kl[0],
            kl_p999=kl[1],
            perplexity=perplexity[0],
        )
    return found


def gate_of_row(name: str) -> Gate:
    if "fp32" in name and "tensorrt" in name:
        return TENSORRT_FP32
    return next(gate for precision, gate in GATES.items() if precision in name)


def numbers(cell: str) -> list[float]:
    """Return the numbers in a cell of a table; 1 % is 0.01."""
    found = re.findall(r"(?<![\w.-])(\d+(?:\.\d+)?(?:e-?\d+)?)( ?%)?", cell)
    return [round(float(number) / (100 if percent else 1), 12) for number, percent in found]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the bundles of README: models/demo/chameleon as `make demo` leaves it, and
    models/two by the command of the quick start, with the tiny model in place of a hub's, neither verified.
    """
    directory = tmp_path_factory.mktemp("demo")
    (directory / "models" / "demo").mkdir(parents=True)
    tiny = load_checkpoint(REPOSITORY / "models" / "tiny" / "chameleon")
    export_bundle(tiny, directory / "models" / "demo" / "chameleon")
    base = REPOSITORY / "models" / "tiny" / "base"
    for seed, name in enumerate(("legal", "code")):
        save_adapter(base, directory / "loras" / name, seed, r=4, target_modules=["c_attn"])
    (command,) = re.findall(r"python -m (chameleon_deploy\.export gpt2 .*)", (REPOSITORY / "README.md").read_text())
    with chdir(directory):
        exported = call(*command.replace("gpt2", str(base)).split(), "--no-verify")
    assert exported.returncode == 0, exported.stderr
    return directory


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_a_page_names_what_exists(page: Path) -> None:
    text = page.read_text()
    assert unknown_commands(text) == []
    assert unknown_targets(text, (REPOSITORY / "Makefile").read_text()) == []
    assert dead_links(page) == []


@pytest.mark.parametrize(
    ("written", "planted", "fault"),
    [
        ("chameleon_deploy.evaluate ", "chameleon_deploy.evaluete ", "chameleon_deploy.evaluete"),
        ("--precision int8", "--precission int8", "chameleon_deploy.export --precission"),
        ("--reference models/wiki --html", "--reference models/wiki --htm", "chameleon_deploy.bench --htm"),
        ("`compare` answers", "`chameleon-deploy compar` answers", "chameleon-deploy compar"),
        ("    make demo ", "    make demmo ", "demmo"),
        ("after `make demo`", "after `make demmo`", "demmo"),
        ("(docs/results.md)", "(docs/result.md)", "docs/result.md"),
        ("(docs/results.md)", "(docs/results.md#nothing)", "docs/results.md#nothing"),
    ],
)
def test_a_wrong_name_in_readme_is_caught(written: str, planted: str, fault: str, tmp_path: Path) -> None:
    text = (REPOSITORY / "README.md").read_text()
    assert written in text
    shutil.copytree(REPOSITORY / "docs", tmp_path / "docs")
    page = tmp_path / "README.md"
    page.write_text(text.replace(written, planted, 1))
    faults = unknown_commands(page.read_text())
    faults += unknown_targets(page.read_text(), (REPOSITORY / "Makefile").read_text())
    assert fault in faults + dead_links(page)


def test_the_snippet_in_readme_prints_what_it_shows(demo: Path) -> None:
    text = (REPOSITORY / "README.md").read_text()
    printed, shown = run_snippets(text, demo)
    assert printed[-len(shown) :] == shown and len(shown) >= 2
    assert len(set(printed[: -len(shown)])) == 3  # two adapters and the base model
    wrong = text.replace(f"# {shown[-1]}", f"# {shown[-1]}!")
    assert printed[-len(shown) :] != run_snippets(wrong, demo)[1]


def test_a_snippet_that_does_not_run_is_caught(demo: Path) -> None:
    text = (REPOSITORY / "README.md").read_text().replace("generation.cluster_id", "generation.cluster")
    with pytest.raises(AssertionError, match="AttributeError"):
        run_snippets(text, demo)


def test_the_snippets_of_the_python_page_run(demo: Path) -> None:
    printed, _ = run_snippets((REPOSITORY / "docs" / "python-api.md").read_text(), demo)
    assert printed


def test_the_page_of_the_architecture_names_files_that_exist() -> None:
    text = (REPOSITORY / "docs" / "architecture.md").read_text()
    assert missing_files(text) == []
    assert missing_files(text.replace("`runtime/", "`runtimes/"))


def test_the_design_page_has_the_texts_of_verify() -> None:
    page = " ".join((REPOSITORY / "docs" / "design.md").read_text().split())
    assert (
        f"measured on {run.NUM_ROWS} texts of at most {run.MAX_TOKENS} tokens, one of up to {run.LONGEST:,}, and "
        f"{run.WINDOWS} windows of {run.WINDOW_TOKENS} tokens"
    ) in page


def test_the_design_page_has_the_limits_of_updates() -> None:
    page = (REPOSITORY / "docs" / "design.md").read_text()
    found = re.search(
        r"batch size \(([\d, ]+)\).* at least (\d+) % of what they move the reference's.* to (\d+) % "
        r"\((\d+) % in int4; of layers of the trunk: (\d+) % in bf16, reported in int8 and int4\)",
        " ".join(page[page.index("Numeric gates") :].split()),
    )
    assert found
    sizes, *percent = found.groups()
    caught, update, of_int4, of_bf16 = (int(number) / 100 for number in percent)
    assert sizes == ", ".join(map(str, promises.BATCH_SIZES))
    assert (caught, update) == (CAUGHT, checkpoint_checks.UPDATE)
    assert checkpoint_checks.HEAD_UPDATES["int4"] == of_int4
    assert {"fp32": update, "fp16": update, "bf16": of_bf16, "int8": None, "int4": None} == checkpoint_checks.UPDATES


def test_the_design_page_has_the_gates_of_the_code() -> None:
    text = (REPOSITORY / "docs" / "design.md").read_text()
    gates = documented_gates(text)
    assert {id(gate_of_row(name)) for name in gates} == {id(gate) for gate in (*GATES.values(), TENSORRT_FP32)}
    assert gates == {name: gate_of_row(name) for name in gates}
    wrong = documented_gates(text.replace("1e-4 / 5e-3", "1e-4 / 5e-2"))
    assert wrong != gates


def test_the_python_page_lists_every_error_code() -> None:
    text = (REPOSITORY / "docs" / "python-api.md").read_text()
    codes = {kind.code for kind in vars(errors).values() if isinstance(kind, type) and hasattr(kind, "code")}
    assert {code for code in codes if f"`{code}`" not in text} <= {errors.ChameleonError.code}


def test_readme_is_short() -> None:
    assert len((REPOSITORY / "README.md").read_text().splitlines()) <= 110

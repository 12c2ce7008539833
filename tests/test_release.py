"""The source archive builds without git, and its wheel installs and runs where nothing is but what it asks for.

The Debian package of the same `make release` is installed and run by runtime/tests/package.cmake.
"""

from __future__ import annotations

import json
import re
import subprocess
import tarfile
import venv
import zipfile
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import chameleon_deploy
from tests.commands import run
from tests.conftest import REPOSITORY

BUNDLE = REPOSITORY / "tests" / "data" / "bundles" / "chameleon_masked"
OUTSIDE = {"PYTHONPATH": None}  # the source of the running tests is not to be found


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The archive and the wheel of `make release`. No network is needed: `[dev]` installs the build backend."""
    directory = tmp_path_factory.mktemp("dist")
    done = run("hatchling", "build", "--directory", directory, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    return directory


@pytest.fixture(scope="module")
def wheel(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the unpacked source archive, where no git is."""
    directory = tmp_path_factory.mktemp("source")
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(directory, filter="data")
    (source,) = directory.iterdir()
    assert source.name == f"chameleon_deploy-{chameleon_deploy.__version__}"
    made = run(
        "pip", "wheel", source, "--no-build-isolation", "--no-deps", "--no-index", "-w", directory, cwd=directory
    )
    assert made.returncode == 0, made.stderr
    (path,) = directory.glob("*.whl")
    return path


def test_the_wheel_of_the_archive_is_that_of_the_tree(wheel: Path, built: Path) -> None:
    (of_the_tree,) = built.glob("*.whl")
    contents = []
    for path in (wheel, of_the_tree):
        with zipfile.ZipFile(path) as archive:
            contents.append({item.filename: item.CRC for item in archive.infolist()})
    assert contents[0] == contents[1]
    assert wheel.name == of_the_tree.name


def test_the_archive_holds_what_a_clone_builds_from(built: Path) -> None:
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    listed = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    left_out = {name for name in listed.split("\n") if name} - names
    assert {name for name in left_out if not name.startswith(".github/")} == set()


def test_one_command_makes_all_three() -> None:
    made = subprocess.run(["make", "--dry-run", "release"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert all(word in made.stdout for word in ("hatchling build", "cpack -G DEB", "sha256sum *.whl *.tar.gz *.deb"))


def test_every_part_has_the_same_version() -> None:
    version, cmake = chameleon_deploy.__version__, (REPOSITORY / "runtime" / "CMakeLists.txt").read_text()
    assert f"project(chameleon VERSION {version} " in cmake
    assert f"\n## {version}" in (REPOSITORY / "CHANGELOG.md").read_text()


def test_what_the_wheel_holds(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(name for name in names if name.endswith(".dist-info/METADATA"))).decode()
    assert "chameleon_deploy/py.typed" in names
    assert any(name.endswith("LICENSE") for name in names)
    assert {name.split("/")[0] for name in names if not re.match(r"[^/]*\.dist-info/", name)} == {"chameleon_deploy"}
    assert f"\nVersion: {chameleon_deploy.__version__}\n" in metadata
    for field in ("Classifier: Typing :: Typed", "Keywords: ", "Project-URL: Repository", "License-Expression: "):
        assert f"\n{field}" in metadata


@pytest.fixture(scope="module")
def bare(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin directory of a virtual environment: the wheel, and links to what its extra `cpu` requires."""
    home = tmp_path_factory.mktemp("bare")
    venv.create(home, symlinks=True)
    python = home / "bin" / "python"
    installed = run("pip", "--python", python, "install", wheel, "--no-deps", "--no-index", env=OUTSIDE)
    assert installed.returncode == 0, installed.stderr
    (packages,) = (home / "lib").glob("python*/site-packages")
    found: dict[str, set[str]] = {}
    (installed_wheel,) = packages.glob("chameleon_deploy-*.dist-info")
    _follow(Distribution.at(installed_wheel).requires or [], {"cpu"}, found)
    for name in found:
        for top in {
            file.parts[0] for file in distribution(name).files or () if file.parts[0] not in ("..", "__pycache__")
        }:
            (packages / top).symlink_to(Path(str(distribution(name).locate_file(top))))
    return home / "bin"


def _follow(requirements: list[str], extras: set[str], found: dict[str, set[str]]) -> None:
    """Add the distributions that are required with some extras, and all that those require: the extras of each."""
    for requirement in map(Requirement, requirements):
        name, wanted = requirement.name.lower().replace("_", "-"), set(requirement.extras)
        applies = requirement.marker is None or any(requirement.marker.evaluate({"extra": e}) for e in {"", *extras})
        if applies and not (name in found and wanted <= found[name]):
            found.setdefault(name, set()).update(wanted)
            _follow(distribution(name).requires or [], wanted, found)


def test_the_wheel_runs_in_a_bare_environment(bare: Path, tmp_path: Path) -> None:
    program = str(bare / "chameleon-deploy")
    version = run("--version", program=program, env=OUTSIDE, cwd=tmp_path)
    assert (version.returncode, version.stdout) == (0, f"chameleon-deploy {chameleon_deploy.__version__}\n")
    code = "import chameleon_deploy; print(chameleon_deploy.__file__)"
    where = run("-c", code, program=str(bare / "python"), env=OUTSIDE, cwd=tmp_path).stdout
    assert where.startswith(str(bare.parent))
    options = ("--prompt", "abc", "--max-new-tokens", 4, "--threads", 1, "--json")
    generated = run("generate", BUNDLE, *options, program=program, env=OUTSIDE, cwd=tmp_path)
    assert generated.returncode == 0, generated.stderr
    expected = chameleon_deploy.load(BUNDLE, threads=1).generate(["abc"], max_new_tokens=4)[0]
    assert json.loads(generated.stdout)["token_ids"] == expected.token_ids


def test_the_bare_environment_is_bare(bare: Path) -> None:
    code = (
        "import importlib.util as u; print([n for n in ('torch', 'transformers', 'onnx', 'pytest') if u.find_spec(n)])"
    )
    found = subprocess.run([bare / "python", "-c", code], env={}, capture_output=True, text=True, check=True).stdout
    assert found.strip() == "[]"


def test_commands_that_need_more_say_what_to_install(bare: Path, tmp_path: Path) -> None:
    refused = run(
        "export", "checkpoint", "--out", "o", program=str(bare / "chameleon-deploy"), env=OUTSIDE, cwd=tmp_path
    )
    assert refused.returncode == 2
    assert "Traceback" not in refused.stderr
    assert "chameleon-deploy[export]" in refused.stderr

"""The corpus of different kinds, from stand-ins for the installed packages."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from chameleon_deploy.errors import DependencyError, InputError
from chameleon_deploy.reference import mixed_corpus
from chameleon_deploy.reference.mixed_corpus import KINDS, LANGUAGES, MAX_BYTES, SUFFIXES, mixed_texts


def catalogue(translations: list[str]) -> bytes:
    """A compiled message catalogue, as msgfmt writes it; the first translation is its header."""
    originals = [f"message {i}".encode() for i in range(len(translations))]
    strings = originals + [t.encode() for t in translations]
    start = 28 + 16 * len(translations)
    table, body = b"", b""
    for string in strings:
        table += struct.pack("<2I", len(string), start + len(body))
        body += string + b"\0"
    n = len(translations)
    return struct.pack("<7I", 0x950412DE, 0, n, 28, 28 + 8 * n, 0, 0) + table + body


def install(site: Path, package: str, files: dict[str, bytes]) -> None:
    """A package as importlib.metadata sees an installed one."""
    info = site / f"{package.replace('-', '_')}-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1\n")
    (info / "RECORD").write_text("".join(f"{name},,\n" for name in files))
    for name, content in files.items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_bytes(content)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    site = tmp_path / "site"
    files = {}
    for part in range(10):
        for kind, suffix in SUFFIXES.items():
            blocks = (f"{kind} {part}.{i} " + "word " * 20 for i in range(12))
            files[f"django/{kind}{part}{suffix}"] = "\n\n".join(blocks).encode()
        files[f"django/static{part}.min.js"] = b"minified " * 100
        for language in LANGUAGES:
            said = ["Content-Type: text/plain"] + [f"{language} ж {part}.{i} " + "слово " * 9 for i in range(24)]
            files[f"django/app{part}/locale/{language}/LC_MESSAGES/django.mo"] = catalogue(said)
    install(site, "django", files)
    talks = {}
    for name in "abcdefghij":
        talk = "".join(f"- - hello {name} {i} {'again ' * 16}\n  - goodbye\n" for i in range(12))
        talks[f"chatterbot_corpus/data/english/{name}.yml"] = f"conversations:\n{talk}".encode()
    install(site, "chatterbot-corpus", talks)
    monkeypatch.syspath_prepend(str(site))
    return site


def test_every_kind_on_both_sides_and_no_source_on_both(site: Path) -> None:
    train, held_out = mixed_texts(per_kind=20, held_out=0.2, seed=0)
    for kind in KINDS:
        sides = [[text for text in side if text.kind == kind] for side in (train, held_out)]
        assert [len(side) for side in sides] == [16, 4]
        assert not {text.source for text in sides[0]} & {text.source for text in sides[1]}
    assert all(40 <= len(text.text.encode()) <= MAX_BYTES for text in train + held_out)
    assert not {text.text for text in train} & {text.text for text in held_out}
    assert not any("minified" in text.text or "Content-Type" in text.text for text in train + held_out)


def test_the_seed_decides_the_split(site: Path) -> None:
    assert mixed_texts(20, 0.2, 0) == mixed_texts(20, 0.2, 0)
    assert {text.source for text in mixed_texts(20, 0.2, 0)[1]} != {text.source for text in mixed_texts(20, 0.2, 1)[1]}


def test_a_catalogue_is_held_out_in_every_language_at_once(site: Path) -> None:
    """Else the same message in two languages would stand on both sides."""
    _, held_out = mixed_texts(20, 0.2, 0)
    by_language = [{text.source for text in held_out if text.kind == language} for language in LANGUAGES]
    assert len(set.union(*by_language)) <= 3


def test_too_many_texts_wanted(site: Path) -> None:
    with pytest.raises(InputError, match="pass a smaller --per-kind"):
        mixed_texts(10_000, 0.2, 0)


def test_no_catalogue(site: Path) -> None:
    with pytest.raises(InputError, match="magic number"):
        mixed_corpus._messages(b"\0" * 28)


def test_without_the_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(DependencyError, match="pip install --no-deps django"):
        mixed_corpus._files("django", "")


def test_the_command(site: Path, tmp_path: Path) -> None:
    out = tmp_path / "mixed"
    command = [sys.executable, "-m", "chameleon_deploy.reference.mixed_corpus", "--out", str(out), "--per-kind", "10"]
    environment = {"PYTHONPATH": f"{site}:{Path(mixed_corpus.__file__).parents[2]}"}
    subprocess.run(command, check=True, env=environment)
    lines = [json.loads(line) for line in (out / "held_out.jsonl").read_text("utf-8").splitlines()]
    assert [line["kind"] for line in lines] == [kind for kind in KINDS for _ in range(2)]
    again = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert again.returncode == 2
    assert again.stderr.endswith("[output_exists]\n")

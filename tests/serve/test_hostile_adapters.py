"""Damaged PEFT directories that requests name: each is refused with its reason, and no other row notices."""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from chameleon_deploy.export.exporter import export_bundle
from chameleon_deploy.reference.adapters import load_adapted
from tests.adapters import save_adapter
from tests.serving import InThread, running

LAYERS = ["q_proj", "v_proj"]
A, B = (f"base_model.model.model.layers.1.self_attn.v_proj.lora_{part}.weight" for part in "AB")
ENDLESS = "(.|[a-z0-9._])+(?<=X)"  # takes two to the power of the length of the name
TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"

Damage = Callable[[Path], Any]


def config(**changes: Any) -> Damage:
    def damage(path: Path) -> None:
        (path / CONFIG).write_text(json.dumps(json.loads((path / CONFIG).read_text()) | changes))

    return damage


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Damage:
    def damage(path: Path) -> None:
        found = load_file(path / TENSORS)
        change(found)
        save_file(found, path / TENSORS)

    return damage


def file(name: str, change: Callable[[Path, bytes], Any]) -> Damage:
    """Put something else in the place of a file; `change` takes its path and its old content."""

    def damage(path: Path) -> None:
        content = (path / name).read_bytes()
        (path / name).unlink()
        change(path / name, content)

    return damage


def claims(place: Path, content: bytes) -> None:
    header = json.dumps({A: {"dtype": "F32", "shape": [10**9, 10**9], "data_offsets": [0, 4]}}).encode()
    place.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)


def longer(place: Path, content: bytes) -> None:
    place.write_bytes(content)
    os.truncate(place, 2**33)


DAMAGES: dict[str, Damage] = {
    "another-method": config(peft_type="IA3"),
    "dora": config(use_dora=True),
    "an-unknown-option": config(some_future_option={"a": 1}),
    "a-large-rank": config(r=10**9),
    "no-rank": config(r=0),
    "an-endless-pattern": config(target_modules=ENDLESS),
    "an-endless-alpha": config(lora_alpha=1e999),
    "a-scaling-beyond-float32": config(lora_alpha=1e308),
    "no-json": file(CONFIG, lambda place, _: place.write_bytes(b"{")),
    "nested-json": file(CONFIG, lambda place, _: place.write_bytes(b'{"r":' * 100_000)),
    "a-pipe": file(CONFIG, lambda place, _: os.mkfifo(place)),
    "a-device": file(CONFIG, lambda place, _: place.symlink_to("/dev/zero")),
    "no-configuration": file(CONFIG, lambda place, _: None),
    "no-tensors": file(TENSORS, lambda place, _: None),
    "cut": file(TENSORS, lambda place, content: place.write_bytes(content[:100])),
    "a-header-that-lies": file(TENSORS, claims),
    "endless-tensors": file(TENSORS, lambda place, _: place.symlink_to("/dev/zero")),
    "a-large-file": file(TENSORS, longer),
    "nan": tensors(lambda found: found[A].fill_(torch.nan)),
    "infinity": tensors(lambda found: found[B].fill_(torch.inf)),
    "another-width": tensors(lambda found: found.update({A: torch.zeros(4, 65)})),
    "integers": tensors(lambda found: found.update({A: found[A].to(torch.int32)})),
    "a-missing-part": tensors(lambda found: found.pop(B)),
    "an-unknown-layer": tensors(lambda found: found.update({A.replace("s.1", "s.9"): found[A].clone()})),
}


@pytest.fixture(scope="module")
def hostile(llama_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[InThread]:
    """A server that takes adapters at first use: a good one, and the same damaged in each way."""
    path, base = tmp_path_factory.mktemp("hostile"), llama_path / "base"
    good = save_adapter(base, path / "files" / "good", 0, 0.3, r=4, target_modules=LAYERS)
    export_bundle(load_adapted(str(base), {}, adaptable=LAYERS, max_rank=4), path / "wiki")
    for name, damage in DAMAGES.items():
        damage(Path(shutil.copytree(good, path / "files" / name)))
    with running(path / "wiki", rows=4, adapters=[str(path / "files")], adapter_resolver=True) as server:
        yield server


def ask(server: InThread, adapter: Any, **fields: Any) -> httpx.Response:
    body = {"prompt": "def main", "max_tokens": 12, "temperature": 0, "adapters": [adapter], **fields}
    return server.post("/v1/completions", **body)


def test_a_damaged_adapter_harms_only_the_request_that_names_it(hostile: InThread) -> None:
    """Whether it is named in a request, in a blend, or loaded in place of a good one; others are asked all the time."""
    expected = {name: ask(hostile, name).json()["choices"][0]["text"] for name in (None, "good")}
    assert expected[None] != expected["good"]
    root = str(hostile.served.runtime.bundle.path.parent)
    wrong, ended = list[Any](), threading.Event()

    def others() -> None:
        while not ended.is_set():
            for name, text in expected.items():
                answer = ask(hostile, name)
                if answer.status_code != 200 or answer.json()["choices"][0]["text"] != text:
                    wrong.append((name, answer.text))

    beside = threading.Thread(target=others)
    beside.start()
    try:
        for name in DAMAGES:
            load = {"lora_name": "good", "lora_path": name, "load_inplace": True}
            for answer in (ask(hostile, name), ask(hostile, {"good": 0.5, name: 0.5}),
                           hostile.post("/v1/load_lora_adapter", **load)):  # fmt: skip
                assert answer.status_code == 400, (name, answer.text)
                error = answer.json()["error"]
                assert error["code"] in ("adapter_invalid", "checkpoint_invalid", "tensor_invalid"), (name, error)
                assert root not in error["message"], (name, error)
    finally:
        ended.set()
        beside.join()
    assert not wrong
    assert hostile.served.runtime.adapters.names == ["good"]
    refused = re.findall(r'rejected_total\{reason="(\w+)"\} (\S+)', httpx.get(f"{hostile.url}/metrics").text)
    # One that came while the bundle was loaded is no adapter's.
    assert sum(float(count) for reason, count in refused if reason != "loading") == 3 * len(DAMAGES)

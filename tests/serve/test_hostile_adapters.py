"""Damaged PEFT directories that requests name: each is refused with its reason, and no other row notices."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from chameleon_deploy.export.exporter import export_bundle
from chameleon_deploy.reference.adapters import load_adapted
from tests.adapters import save_adapter
from tests.damaged_adapters import DAMAGES
from tests.serving import InThread, running

LAYERS = ["q_proj", "v_proj"]


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
    """Whether it is named in a request, in a blend, or loaded in place of a good one; others are asked beside each."""
    expected = {name: ask(hostile, name).json()["choices"][0]["text"] for name in (None, "good")}
    assert expected[None] != expected["good"]
    root = str(hostile.served.runtime.bundle.path.parent)

    def others() -> list[str]:
        answers = {name: ask(hostile, name) for name in expected}
        return [
            f"{name}: {answer.text}"
            for name, answer in answers.items()
            if answer.status_code != 200 or answer.json()["choices"][0]["text"] != expected[name]
        ]

    with ThreadPoolExecutor(1) as beside:
        for name in DAMAGES:
            asked = beside.submit(others)
            load = {"lora_name": "good", "lora_path": name, "load_inplace": True}
            for answer in (ask(hostile, name), ask(hostile, {"good": 0.5, name: 0.5}),
                           hostile.post("/v1/load_lora_adapter", **load)):  # fmt: skip
                assert answer.status_code == 400, (name, answer.text)
                error = answer.json()["error"]
                assert error["code"] in ("adapter_invalid", "checkpoint_invalid", "tensor_invalid"), (name, error)
                assert root not in error["message"], (name, error)
            assert asked.result() == [], name
    assert hostile.served.runtime.adapters.names == ["good"]
    refused = re.findall(r'rejected_total\{reason="(\w+)"\} (\S+)', httpx.get(f"{hostile.url}/metrics").text)
    # One that came while the bundle was loaded is no adapter's.
    assert sum(float(count) for reason, count in refused if reason != "loading") == 3 * len(DAMAGES)

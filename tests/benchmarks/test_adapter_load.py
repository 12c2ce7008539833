"""`benchmarks.adapter_load` and `benchmarks.fairness` on a small model, and a wrong answer that is seen."""

from __future__ import annotations

import math
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

import chameleon_deploy
from benchmarks.adapter_load import Answer, Load, with_other_versions, write_versions, wrong_answers
from chameleon_deploy import Sampling
from chameleon_deploy.export.exporter import export_bundle
from chameleon_deploy.reference.adapters import load_adapted
from tests.commands import call
from tests.conftest import REPOSITORY
from tests.serving import wait_for


@pytest.fixture(scope="module")
def empty(llama_path: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A bundle that takes adapters, and its base model."""
    base, out = llama_path / "base", tmp_path_factory.mktemp("empty") / "bundle"
    export_bundle(load_adapted(str(base), {}, adaptable=["q_proj", "down_proj"], max_rank=4), out)
    return out, base


def test_every_answer_under_load_is_pefts(empty: tuple[Path, Path]) -> None:
    bundle, base = empty
    sizes = ["--adapters", 4, "--rank", 4, "--clients", 3, "--minutes", 0.03, "--prompt-tokens", 20, "--tokens", 6]
    result = call("benchmarks.adapter_load", bundle, "--reference", base, *sizes, "--threads", 1)
    assert result.returncode == 0, result.stdout + result.stderr
    shown = " ".join(result.stdout.split())
    assert re.search(
        r"[1-9]\d* different answers read with PEFT, 0 wrong, 0 lost; of [1-9]\d* read .* [1-9]\d* are seen", shown
    ), shown


def test_an_answer_of_another_version_is_seen(empty: tuple[Path, Path], tmp_path: Path) -> None:
    bundle, base = empty
    runtime = chameleon_deploy.load(bundle, threads=1)
    write_versions(tmp_path, runtime.manifest.adaptation, adapters=1, rank=4)
    runtime.load_adapter("a", tmp_path / "a0.0")
    load = Load("", [[5, 9, 301, 17, 44, 8]], 1, 12)
    endless = Sampling(ignore_eos=True)
    (row,) = runtime.generate(load.prompts, adapters=["a"], max_new_tokens=12, sampling=endless)
    answers = [Answer(0, "a" * 16, tuple(row.token_ids), 0.1)]
    load.files["a" * 16] = "a0.0"
    for asked, wrong in ((load, 0), (with_other_versions(load), 1)):
        count, found = wrong_answers(base, tmp_path, asked, answers, "fp32")
        assert (count, len(found)) == (1, wrong), found


def test_a_request_that_is_not_answered_is_lost() -> None:
    """But for one of an adapter that is unloaded while it comes."""
    replies = iter([
        httpx.Response(400, json={"error": {"message": "no adapter is named 'a0'"}}),
        httpx.Response(503, text="closed"),
        httpx.Response(200, text='data: {"choices": [{"token_ids": [5]}], "system_fingerprint": "x-y"}\n\n'),
        httpx.Response(400, json={"error": {"message": "no adapter is named 'a0'"}}),
        httpx.Response(400, json={"error": {"message": "no adapter is named 'a0'"}}),
    ])  # fmt: skip

    def reply(request: httpx.Request) -> httpx.Response:
        found = next(replies, None)
        if found is None:
            raise httpx.ReadTimeout("late", request=request)
        return found

    load, chance = Load("", [[5, 9]], 1, 12), random.Random(0)
    with httpx.Client(base_url="http://nowhere", transport=httpx.MockTransport(reply)) as http:
        for _ in range(3):
            assert load.ask(http, chance, uses_adapters=True) is None
        load.away["a0"] = [(0.0, math.inf)]
        assert load.ask(http, chance, uses_adapters=True) is None
        assert len(load.lost) == 3
        load.away["a0"] = [(0.0, 0.0)]  # it has been back for long
        for _ in range(2):
            assert load.ask(http, chance, uses_adapters=True) is None
    for lost, part in zip(load.lost, ("is named", "closed", "1 tokens of 12", "is named", "late"), strict=True):
        assert part in lost


def test_two_tenants_are_measured(bundle: Path) -> None:
    sizes = ["--requests", 3, "--prompt-tokens", 8, "--flood-tokens", 60, "--clients", 3, "--capacity", 100]
    result = call("benchmarks.fairness", bundle, *sizes, "--threads", 1)
    assert result.returncode == 0, result.stdout + result.stderr
    shown = " ".join(result.stdout.split())
    assert "are within twice the median alone and one chunk" in shown
    assert re.search(r"a chunk takes (?!0\.0)\d+\.\d ms, and \d+\.\d ms while", shown), shown
    assert call("benchmarks.fairness").returncode == 2


def test_a_command_that_is_told_to_end_ends_its_server(bundle: Path, tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from benchmarks.served import serving\n"
        "with serving(Path(sys.argv[1]), Path(sys.argv[2]), 1, 1, 32) as (_, process):\n"
        "    print(process, flush=True)\n"
        "    time.sleep(600)\n"
    )
    command = [sys.executable, "-c", program, str(bundle), str(tmp_path / "log")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY) as started:
        assert started.stdout is not None
        server = int(started.stdout.readline())
        started.send_signal(signal.SIGTERM)
        assert started.wait(60) == 128 + signal.SIGTERM
    wait_for(lambda: not Path(f"/proc/{server}").exists())

"""The C++ engine against the Python engine over random schedules of requests: the same tokens, texts and iterations.

CHAMELEON_EXAMPLES=1000 makes as many schedules; a run of the suite makes a few.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import chameleon_deploy
from chameleon_deploy.export.exporter import export_bundle
from chameleon_deploy.reference.adapters import load_adapted
from chameleon_deploy.verify.adapter_checks import random_adapters
from tests.cpp.c_interface import BUILD
from tests.schedules import random_prefix_schedule, random_schedule, run_schedule

KINDS = ("chameleon", "lora", "llama", "int8", "llama-int8", "given", "given-int8")
# submits of a schedule of texts that begin alike are operations, and iterations besides
PREFIX_EXAMPLES = max(3, int(os.environ.get("CHAMELEON_OPERATIONS", "0")) // 100)
EXAMPLES = int(os.environ.get("CHAMELEON_EXAMPLES", "40")) // len(KINDS)


def run_native(bundle: Path, schedules: list[dict[str, Any]]) -> list[Any]:
    lines = "".join(json.dumps(schedule) + "\n" for schedule in schedules)
    program = [str(BUILD / "tests" / "chameleon_schedules"), str(bundle)]
    output = subprocess.run(program, input=lines, check=True, capture_output=True, text=True).stdout
    return [json.loads(line) for line in output.split("\n") if line]  # texts hold other ends of lines


@pytest.mark.parametrize("kind", KINDS)
def test_random_schedules_give_the_same_tokens(mini_bundles: dict[str, Path], kind: str) -> None:
    python, random = chameleon_deploy.load(mini_bundles[kind]), np.random.default_rng(KINDS.index(kind))
    schedules = [random_schedule(random, python) for _ in range(EXAMPLES)]
    for number, found in enumerate(run_native(mini_bundles[kind], schedules)):
        assert found == run_schedule(python, schedules[number]), number


@pytest.fixture(scope="module")
def adapted_bundle(llama_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with adapters of all and of some layers, and an activated one."""
    path = tmp_path_factory.mktemp("adapted") / "bundle"
    base = random_adapters(load_adapted(str(llama_path / "base"), {}, adaptable=["all"], max_rank=2))
    export_bundle(dataclasses.replace(base, adaptable=(), max_rank=0), path)
    return path


@pytest.mark.parametrize("kind", ["updated", "int8", "llama", "adapted"])
def test_random_texts_find_the_same_in_the_prefix_cache(
    mini_bundles: dict[str, Path], adapted_bundle: Path, kind: str
) -> None:
    """In a model whose trunk is updated, in int8, where all modes share one cache, and with adapters."""
    mini_bundles = {**mini_bundles, "adapted": adapted_bundle}
    python, random = chameleon_deploy.load(mini_bundles[kind]), np.random.default_rng(11)
    schedules = [random_prefix_schedule(random, python) for _ in range(PREFIX_EXAMPLES)]
    hits = evictions = 0
    for number, found in enumerate(run_native(mini_bundles[kind], schedules)):
        assert found == run_schedule(python, schedules[number]), number
        hits, evictions = hits + found["prefix_cache"][4], evictions + found["prefix_cache"][5]
    assert hits > 0
    assert evictions > 0


def test_another_seed_or_place_is_seen(mini_bundles: dict[str, Path]) -> None:
    python, random = chameleon_deploy.load(mini_bundles["chameleon"]), np.random.default_rng(7)
    submit = {
        "at": 0, "prompts": [[5, 6, 7], [8] * 20], "mode": "request", "tenant": None, "rank": None, "overflows": False,
        "max_new_tokens": 12, "sampling": {"temperature": 1.0, "seed": int(random.integers(100))}, "n": 2,
        "expires": False, "adapt_tokens": None, "cancel_at": None,
    }  # fmt: skip
    schedule: dict[str, Any] = {
        "rows": 3, "prefill_tokens": 8, "max_factor_sets": 2, "capacity": 40, "submits": [submit],
    }  # fmt: skip
    another_seed, another_place = copy.deepcopy(schedule), copy.deepcopy(schedule)
    another_seed["submits"][0]["sampling"]["seed"] += 1
    another_place["submits"][0]["at"] = 1
    expected = run_schedule(python, schedule)
    same, *others = run_native(mini_bundles["chameleon"], [schedule, another_seed, another_place])
    assert same == expected
    assert [other["rows"] == expected["rows"] for other in others] == [False, True]
    assert all(other["iterations"] != expected["iterations"] for other in others[1:])

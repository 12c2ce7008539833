"""The Python runtime against tests/data, which the C++ tests read too."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import chameleon_deploy
from chameleon_deploy.errors import ChameleonError
from chameleon_deploy.runtime import Generation, Runtime, Sampling
from chameleon_deploy.runtime.sampling import choose, log_probabilities, uniform
from chameleon_deploy.runtime.sampling_settings import check_sampling
from tests.plain_sampling import FAULTS, plain_choose
from tests.schedules import run_schedule
from tests.shared_data import (
    DATA,
    adapter_case,
    case_arguments,
    case_logits,
    choice_arguments,
    good_bundle,
    hostile_bundle,
    read,
    released_answers,
)

NAMES = ("chameleon_masked", "chameleon_paper", "lora_masked", "chameleon_given")
# Another machine's kernels may add in another order; tokens and embeddings are equal all the same.
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def runtimes() -> dict[str, Runtime]:
    return {name: chameleon_deploy.load(good_bundle(name)) for name in NAMES}


@pytest.mark.parametrize("case", read("hostile.json"), ids=lambda case: case["name"])
def test_a_hostile_bundle_is_refused_with_its_code(case: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ChameleonError) as error:
        chameleon_deploy.load(hostile_bundle(case, tmp_path / "bundle"))
    assert error.value.code == case["code"]


@pytest.mark.parametrize("case", read("adapters.json"), ids=lambda case: case["name"])
def test_an_adapter_file_is_loaded_or_refused_with_its_code(case: dict[str, Any], tmp_path: Path) -> None:
    bundle, file = adapter_case(case, tmp_path)
    runtime = chameleon_deploy.load(bundle)
    before = runtime.adapters.names
    if case["code"] is None:
        runtime.load_adapter("legal", file)
        assert runtime.adapters.names == [*before, "legal"]
        return
    with pytest.raises(ChameleonError) as error:
        runtime.load_adapter("legal", file)
    assert error.value.code == case["code"]
    assert runtime.adapters.names == before


@pytest.mark.parametrize("case", read("golden.json"), ids=lambda case: f"{case['bundle']}-{case['mode']}")
def test_golden(case: dict[str, Any], runtimes: dict[str, Runtime]) -> None:
    runtime = runtimes[case["bundle"]]
    rows, how = case_arguments(case, runtime.manifest.model)
    adaptation = runtime.adapt(rows, **how)
    lora_B = np.asarray(adaptation.factors.sets.tensors["lm_head.lora_B"])
    assert adaptation.cluster_ids.tolist() == case["cluster_ids"]
    assert adaptation.factors.factor_ids.tolist() == case["factor_ids"]
    assert adaptation.embeddings.tolist() == case["embeddings"]
    np.testing.assert_allclose(lora_B[:, 0, :4], case["lora_B_first"], atol=TOLERANCE)
    for score, logprobs in zip(runtime.score(rows, **how), case["token_logprobs"], strict=True):
        # Of a row with log-probabilities down to -1000, any one is a difference of numbers as large.
        tolerance = TOLERANCE * (1 + np.abs(logprobs).max(initial=0))
        np.testing.assert_allclose(score.token_logprobs, logprobs, rtol=0, atol=tolerance)
    limit, sampling = case["max_new_tokens"], Sampling(**case["sampling"])
    greedy, sampled = ([Generation(**g) for g in case[name]] for name in ("greedy", "sampled"))
    assert runtime.generate(rows, max_new_tokens=limit, **how) == greedy
    assert runtime.generate(rows, max_new_tokens=limit, sampling=sampling, **how) == sampled
    stream = runtime.stream(rows, max_new_tokens=limit, sampling=sampling, **how)
    assert [[t.row, t.token_id, t.text, t.generation is not None] for t in stream] == case["stream"]


RELEASED = sorted((DATA / "released").iterdir())


@pytest.mark.parametrize("version", RELEASED, ids=lambda version: version.name)
def test_bundles_of_released_versions_give_what_they_gave(version: Path) -> None:
    answers = json.loads((version / "answers.json").read_text())
    recorded = [answer["token_ids"] for answer in answers]
    assert released_answers(version, answers) == recorded
    # The fault: a call of the adapters one row further.
    moved = [{**answer, "adapters": [*answer["adapters"][1:], None]} for answer in answers if "adapters" in answer]
    assert released_answers(version, moved) != recorded[-len(moved) :]


def test_this_version_has_its_files() -> None:
    assert chameleon_deploy.__version__ in {version.name for version in RELEASED}


@pytest.mark.parametrize("case", read("schedules.json"), ids=lambda case: case["bundle"])
def test_schedules(case: dict[str, Any], runtimes: dict[str, Runtime]) -> None:
    assert run_schedule(runtimes[case["bundle"]], case["schedule"]) == case["result"]


def test_uniform() -> None:
    for case in read("sampling.json")["uniform"]:
        assert uniform(int(case["seed"]), case["stream"], case["step"]) == case["u"]


def test_choose() -> None:
    for case in read("sampling.json")["choose"]:
        assert choose(*choice_arguments(case)) == case["token_id"]


def test_log_probabilities() -> None:
    for case in read("sampling.json")["log_probabilities"]:
        choice = log_probabilities(case_logits(case), case["token_id"], case["count"])
        assert (choice.logprob, list(map(list, choice.top_logprobs or ()))) == (case["logprob"], case["top_logprobs"])


def test_settings_at_their_limits() -> None:
    for case in read("sampling.json")["settings"]:
        try:
            check_sampling(Sampling(**case["settings"]), 4096)
            code = None
        except ChameleonError as error:
            code = error.code
        assert code == case["code"], str(case)[:200]


@pytest.mark.parametrize("fault", FAULTS)
def test_the_cases_of_choose_notice_a_fault(fault: str) -> None:
    def plain(case: dict[str, Any], fault: str) -> int:
        _, _, sampling, u, allowed = choice_arguments(case)
        return plain_choose(case["logits"], case["prompt"], case["generated"], sampling, u, allowed, fault)

    cases = [case for case in read("sampling.json")["choose"] if "logits" in case]
    assert all(plain(case, "") == case["token_id"] for case in cases)
    assert any(plain(case, fault) != case["token_id"] for case in cases)


def test_tokenizer(runtimes: dict[str, Runtime]) -> None:
    tokenizer, cases = runtimes["chameleon_masked"].tokenizer, read("tokenizer.json")
    for case in cases["encode"]:
        assert tokenizer.encode(case["text"]).ids == case["token_ids"]
    for case in cases["decode"]:
        assert tokenizer.decode(case["token_ids"], skip_special_tokens=True) == case["text"]


def test_bytes_that_are_no_text_are_refused(runtimes: dict[str, Runtime]) -> None:
    for raw in read("tokenizer.json")["invalid"]:
        text = base64.b64decode(raw).decode("utf-8", "surrogateescape")
        with pytest.raises(ChameleonError) as error:
            runtimes["chameleon_masked"].generate([text])
        assert error.value.code == "input_invalid"

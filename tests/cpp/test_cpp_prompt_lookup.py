"""Prompt lookup in C++: the tokens of Python's plain decoding."""

from __future__ import annotations

import json
import subprocess

import pytest

import chameleon_deploy
from chameleon_deploy import Sampling
from tests.cpp.c_interface import BUILD, NativeRuntime
from tests.shared_data import good_bundle


@pytest.mark.parametrize("temperature", [0.0, 0.6])
def test_both_languages_draft_without_a_trace(temperature: float) -> None:
    bundle = good_bundle("chameleon_masked")
    runtime = chameleon_deploy.load(bundle, mode="centroid")
    prompt, sampling = "the the the the", Sampling(temperature=temperature, seed=4)
    expected = runtime.generate([prompt], max_new_tokens=24, sampling=sampling)[0].token_ids
    python = runtime.generate([prompt], max_new_tokens=24, sampling=sampling, prompt_lookup_num_tokens=4)
    options = ["--max-new-tokens", "24", "--temperature", str(temperature), "--seed", "4", "--mode", "centroid"]
    command = [str(BUILD / "chameleon-run"), "generate", str(bundle), "--prompt", prompt, "--json", *options]
    cpp = subprocess.run([*command, "--prompt-lookup-num-tokens", "4"], capture_output=True, text=True, check=True)
    assert python[0].token_ids == expected
    assert json.loads(cpp.stdout)["token_ids"] == expected
    native = NativeRuntime(bundle, "centroid")
    c = native.generate([prompt], max_new_tokens=24, sampling=sampling, prompt_lookup_num_tokens=4)
    assert c[0].token_ids == expected
    native.close()

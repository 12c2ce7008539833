"""docs/features.md: a feature gives the library's tokens wherever the table says yes, and its error code elsewhere."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack
from functools import cache
from typing import Any

import pytest

import chameleon_deploy
from chameleon_deploy import Adapt, Engine, Generate, Runtime, Sampling
from chameleon_deploy.errors import ChameleonError
from tests.features import PLAIN, PROMPTS, Use, table, uses
from tests.serving import Running, running
from tests.shared_data import adapter_case, good_bundle, read

INTERFACES = ("generate", "stream", "engine", "server")


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with ExitStack() as stack:

        @cache
        def server(bundle: str) -> Running:
            path = good_bundle(bundle)
            if bundle == "adapters":
                path, _ = adapter_case(read("adapters.json")[0], tmp_path_factory.mktemp("adapters"))
            return stack.enter_context(running(path, rows=4))

        yield server


def found_by_library(call: str, runtime: Runtime, generate: Generate, adapt: Adapt) -> list[list[int]]:
    if call == "generate":
        return [generation.token_ids for generation in runtime.generate(PROMPTS, generate, adapt)]
    if call == "stream":
        rows: list[list[int]] = [[] for _ in range(len(PROMPTS) * generate.n)]
        for token in runtime.stream(PROMPTS, generate, adapt):
            rows[token.row] += [token.token_id] * (token.token_id >= 0)
        return rows
    with Engine(runtime, rows=4, prefill_tokens=8) as engine:
        return [generation.token_ids for generation in engine.submit(PROMPTS, generate, adapt).result(60)]


def body_of(use: Use, name: str) -> dict[str, Any]:
    """Return the body of a request that means the same."""
    own = use.body if use.body is not None else {**use.adapt, **use.generate}
    bias = {str(token_id): value for token_id, value in use.sampling.get("logit_bias", {}).items()}
    sampling = {**PLAIN, **use.sampling, **({"logit_bias": bias} if bias else {})}
    return {"model": name, "prompt": PROMPTS, "max_tokens": 8, "return_token_ids": True, **sampling, **own}


CELLS = [(feature, interface) for feature in table() for interface in INTERFACES]


@pytest.mark.parametrize(("feature", "interface"), CELLS)
def test_a_cell(feature: str, interface: str, servers: Any, int8_runtime: Runtime) -> None:
    cell = table()[feature][interface]
    if feature == "prompt lookup in int8" and interface == "server":
        with running(int8_runtime.bundle.path) as int8:
            answer = int8.post("/v1/completions", prompt="The river", prompt_lookup_num_tokens=4)
        assert answer.json()["error"]["code"] == cell
        assert answer.json()["error"]["param"] == "prompt_lookup_num_tokens"
        return
    if feature == "prompt lookup in int8":
        with pytest.raises(ChameleonError) as refused:
            found_by_library(interface, int8_runtime, Generate(prompt_lookup_num_tokens=4), Adapt())
        assert refused.value.code == cell
        return
    for use in uses()[feature]:
        server: Running = servers(use.bundle)
        sampling = [Sampling(**{**PLAIN, **use.sampling})] * len(PROMPTS)
        generate = Generate(**{"max_new_tokens": 8, "sampling": sampling, **use.generate})
        adapt = Adapt(**{"mode": None if use.bundle != "chameleon_masked" else "centroid", **use.adapt})
        expected = [generation.token_ids for generation in server.runtime.generate(PROMPTS, generate, adapt)]
        if interface != "server":
            assert cell == "yes"
            assert found_by_library(interface, server.runtime, generate, adapt) == expected
            continue
        answer = server.post("/v1/completions", **body_of(use, server.name))
        if code := re.match(r"`?(\w+_\w+)", cell):
            assert answer.json()["error"]["code"] == code[1]
        else:
            assert cell.startswith("yes"), cell
            choices = answer.json()["choices"]
            assert [choice["token_ids"] for choice in choices] == expected
            assert (choices[0]["finish_reason"] == "deadline") == (feature == "a deadline")


def test_the_plain_request_differs_from_each_feature() -> None:
    """Else a feature that is ignored everywhere would pass: each use changes what is generated or refused."""
    runtime = chameleon_deploy.load(good_bundle("chameleon_masked"), threads=1, mode="centroid")
    sampling = Sampling(**PLAIN)
    plain = runtime.generate(PROMPTS, Generate(8, [sampling] * 3))
    for feature, (use, *_) in uses().items():
        if use.bundle != "chameleon_masked" or feature in ("prompt lookup", "no stop at the end of text"):
            continue
        how = {"max_new_tokens": 8, "sampling": [Sampling(**{**PLAIN, **use.sampling})] * 3, **use.generate}
        adapt = Adapt(**{"mode": "centroid", **use.adapt})
        assert runtime.generate(PROMPTS, Generate(**how), adapt) != plain, feature

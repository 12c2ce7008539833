"""Two Ray nodes with four replicas of one thread: one machine's results, and what becomes of requests when one dies.

pip install -e '.[cpu,ray]', then: python -m pytest -m ray tests/serve/test_ray.py
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import yaml

import chameleon_deploy
from chameleon_deploy import Runtime
from chameleon_deploy.errors import InputError
from tests.ray_cluster import SECONDS, Cluster, cluster, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]
REPOSITORY = Path(__file__).parents[2]
STREAMS = 32
KILLS = int(os.environ.get("CHAMELEON_DEPLOY_RAY_KILLS", "2"))  # 10 is the long form
PROMPTS = [f"The river number {i} of" for i in range(STREAMS)]
TOKENS = 60


@pytest.fixture(scope="module")
def running(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("ray"), (3, 3)) as found:
        found.deploy(bundle, replicas=4, routing="cluster", drain_seconds=5)
        wait_for(found.is_healthy)
        yield found


@pytest.fixture(scope="module")
def runtime(bundle: Path) -> Runtime:
    return chameleon_deploy.load(bundle, mode="centroid", threads=1)


@pytest.fixture(scope="module")
def expected(runtime: Runtime) -> list[str]:
    return [runtime.generate([prompt], max_new_tokens=TOKENS)[0].text for prompt in PROMPTS]


def test_the_results_of_one_machine(running: Cluster, runtime: Runtime, expected: list[str]) -> None:
    client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0, timeout=SECONDS)
    before = running.metric("chameleon_generation_tokens_total")
    name = client.models.list().data[0].id
    whole = client.completions.create(model=name, prompt=PROMPTS, max_tokens=TOKENS, temperature=0)
    assert [choice.text for choice in whole.choices] == expected
    for prompt, text in zip(PROMPTS[:4], expected[:4], strict=True):
        stream = client.completions.create(model=name, prompt=prompt, max_tokens=TOKENS, temperature=0, stream=True)
        parts = [chunk.choices[0].text for chunk in stream]
        assert "".join(parts) == text and len(parts) > 10
    scores = httpx.post(f"{running.url}/v1/score", json={"input": PROMPTS[:2]}, timeout=SECONDS).json()["data"]
    for score, ours in zip(scores, runtime.score(PROMPTS[:2]), strict=True):
        assert score["token_logprobs"] == pytest.approx(ours.token_logprobs, abs=1e-5)
    ids = runtime.tokenizer.encode(PROMPTS[0]).ids
    assert httpx.post(f"{running.url}/tokenize", json={"prompt": PROMPTS[0]}).json()["tokens"] == ids
    assert "<html" in httpx.get(f"{running.url}/").text
    assert httpx.get(f"{running.url}/openapi.json").json()["openapi"]
    assert httpx.get(f"{running.url}/v1/models/{name}:none").json()["mode"] == "none"
    assert httpx.get(f"{running.url}/nothing").status_code == 404
    bad = httpx.post(f"{running.url}/v1/completions", json={"prompt": "a", "best_of": 7})
    assert bad.status_code == 400 and bad.json()["error"]["param"] == "best_of"
    lengths = [len(generation.token_ids) for generation in runtime.generate(PROMPTS, max_new_tokens=TOKENS)]
    generated = running.metric("chameleon_generation_tokens_total") - before
    assert generated == sum(lengths) + sum(lengths[:4])


@pytest.mark.parametrize(
    "arguments",
    [
        {"replicas": "0"},
        {"routing": "nearest"},
        {"max_replicas": "1", "replicas": "2"},
        {"bound": "0.5"},
        {"row": "8"},
        {"adapters": "models/adapters"},
        {"threads": "many"},
    ],
)
def test_bad_arguments(arguments: dict[str, str]) -> None:
    from chameleon_deploy.serve.ray import app

    with pytest.raises(InputError):
        app({"bundle": "models/wiki", **arguments})


@pytest.mark.parametrize("name", ["ray.yaml", "kuberay.yaml"])
def test_the_examples_are_taken(name: str) -> None:
    from chameleon_deploy.serve.ray import app

    document = yaml.safe_load((REPOSITORY / "docs" / "scaling" / name).read_text())
    document = yaml.safe_load(document["spec"]["serveConfigV2"]) if "spec" in document else document
    (application,) = document["applications"]
    assert application["import_path"] == "chameleon_deploy.serve.ray:app"
    assert app(application["args"])


async def _stream(client: httpx.AsyncClient, prompt: str) -> tuple[str, list[str], bool]:
    """The text, the codes of the error events, and whether the stream ended as it should."""
    text, errors, done = "", list[str](), False
    body: dict[str, Any] = {"prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "stream": True}
    async with client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                done = True
            elif line:
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    errors.append(event["error"]["code"])
                else:
                    text += "".join(choice["text"] for choice in event["choices"])
    return text, errors, done


async def _under_load(running: Cluster, kill: bool) -> list[tuple[str, list[str], bool]]:
    async with httpx.AsyncClient(
        base_url=running.url, timeout=SECONDS, limits=httpx.Limits(max_connections=None)
    ) as client:
        streams = [asyncio.create_task(_stream(client, prompt)) for prompt in PROMPTS]
        if kill:
            await asyncio.sleep(0.3)
            os.kill(running.replicas()[0].pid, signal.SIGKILL)
        return await asyncio.gather(*streams)


def test_a_killed_replica_ends_only_the_streams_it_had_begun(running: Cluster, expected: list[str]) -> None:
    wait_for(lambda: len(running.replicas()) == 4)
    began = time.monotonic()
    assert [text for text, _, _ in asyncio.run(_under_load(running, kill=False))] == expected
    usual, broken = time.monotonic() - began, 0
    for _ in range(KILLS):
        began = time.monotonic()
        for (text, errors, done), whole in zip(asyncio.run(_under_load(running, kill=True)), expected, strict=True):
            if errors:
                assert errors == ["closed"] and not done and text and whole.startswith(text.rstrip("\ufffd"))
                broken += 1
            else:
                assert done and text == whole
        assert time.monotonic() - began < usual + 10
        wait_for(lambda: len(running.replicas()) == 4)
        wait_for(running.is_healthy)
    assert broken < KILLS * STREAMS


def test_a_new_bundle_replaces_the_old_one_without_losing_a_request(
    running: Cluster, bundle: Path, expected: list[str]
) -> None:
    async def load(until: asyncio.Event) -> int:
        answered = 0
        async with httpx.AsyncClient(base_url=running.url, timeout=SECONDS) as client:
            while not until.is_set():
                for text, errors, done in await asyncio.gather(*(_stream(client, prompt) for prompt in PROMPTS[:8])):
                    assert done and not errors and text == expected[answered % 8]
                    answered += 1
        return answered

    async def run() -> int:
        until = asyncio.Event()
        loading = asyncio.create_task(load(until))
        await asyncio.to_thread(running.deploy, bundle, replicas=4, routing="load", rows=4, drain_seconds=5)
        until.set()
        return await loading

    assert asyncio.run(run()) > 0


def test_a_node_goes_and_another_comes(running: Cluster, expected: list[str]) -> None:
    running.remove_node(running.nodes[1])
    running.add_node(3)
    wait_for(lambda: len(running.replicas()) == 4)
    wait_for(running.is_healthy)
    assert [text for text, _, _ in asyncio.run(_under_load(running, kill=False))] == expected

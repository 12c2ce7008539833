"""Two Ray nodes with four replicas of one thread: one machine's results, and what becomes of requests when one dies.

`make scale` runs these; with CHAMELEON_DEPLOY_RAY_KILLS=10 the long form.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import openai
import pytest
import yaml

import chameleon_deploy
from chameleon_deploy import Runtime
from chameleon_deploy.errors import InputError
from chameleon_deploy.serve.event_stream import DONE
from tests import lm_evaluation
from tests.ray_cluster import SECONDS, Cluster, wait_for
from tests.ray_load import TOKENS, Answer, connect, stream

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]
REPOSITORY = Path(__file__).parents[2]
STREAMS = 32
KILLS = int(os.environ.get("CHAMELEON_DEPLOY_RAY_KILLS", "2"))  # 10 is the long form
ROWS = 4  # of each replica: half of the streams wait
PROMPTS = [f"The river number {i} of" for i in range(STREAMS)]


@pytest.fixture(scope="module")
def running(ray_cluster: Cluster, bundle: Path) -> Cluster:
    ray_cluster.deploy(bundle, replicas=4, routing="cluster", rows=ROWS, drain_seconds=5)
    wait_for(ray_cluster.is_healthy)
    return ray_cluster


@pytest.fixture(scope="module")
def runtime(bundle: Path) -> Runtime:
    return chameleon_deploy.load(bundle, mode="centroid", threads=1)


@pytest.fixture(scope="module")
def texts(runtime: Runtime) -> list[str]:
    return [runtime.generate([prompt], max_new_tokens=TOKENS)[0].text for prompt in PROMPTS]


def test_the_results_of_one_machine(running: Cluster, runtime: Runtime, texts: list[str]) -> None:
    client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0, timeout=SECONDS)
    before = running.metric("chameleon_generation_tokens_total")
    name = client.models.list().data[0].id
    whole = client.completions.create(model=name, prompt=PROMPTS, max_tokens=TOKENS, temperature=0)
    assert [choice.text for choice in whole.choices] == texts
    for prompt, text in zip(PROMPTS[:4], texts[:4], strict=True):
        chunks = client.completions.create(model=name, prompt=prompt, max_tokens=TOKENS, temperature=0, stream=True)
        parts = [chunk.choices[0].text for chunk in chunks]
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
        {"adapters": "models/adapters", "adapter_resolver": "false"},
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


def test_lm_eval_reads_the_results_of_one_machine(
    running: Cluster, runtime: Runtime, bundle: Path, tmp_path: Path
) -> None:
    tasks = lm_evaluation.write_tasks(tmp_path / "tasks", runtime, documents=10)
    _, samples = lm_evaluation.evaluate_server(tasks, tmp_path / "out", running.url, f"{bundle.name}:none")
    assert len(samples) == 20
    for sample in samples:
        found, wanted = lm_evaluation.likelihoods(sample), lm_evaluation.expected(runtime, sample)
        assert [value for value, _ in found] == pytest.approx([value for value, _ in wanted], abs=1e-4)
        assert [is_greedy for _, is_greedy in found] == [is_greedy for _, is_greedy in wanted]


async def _under_load(running: Cluster, kill: int | None = None) -> tuple[list[Answer], set[int]]:
    """Answer all prompts at once, and kill a replica in the middle of some of them, which are returned too.

    The replica is stopped first. It has begun what does not go on when the others have ended; where that is nothing, it
    is not killed.
    """
    answers, begun = [Answer() for _ in PROMPTS], set[int]()
    async with connect(running.url) as client:
        streams = [asyncio.create_task(stream(client, *pair)) for pair in zip(PROMPTS, answers, strict=True)]
        if kill is not None:
            while sum(bool(answer.events) for answer in answers) < ROWS:
                await asyncio.sleep(0.01)
            os.kill(kill, signal.SIGSTOP)
            await _until_nothing_goes_on(answers)
            begun = {i for i, answer in enumerate(answers) if answer.events and not answer.done}
            os.kill(kill, signal.SIGKILL if begun else signal.SIGCONT)
        return await asyncio.gather(*streams), begun


async def _until_nothing_goes_on(answers: list[Answer]) -> None:
    before = None
    while before != (before := [answer.events for answer in answers]):
        await asyncio.sleep(3)


def _wait_for_another(running: Cluster, killed: int) -> None:
    wait_for(lambda: len(running.replicas()) == 4 and killed not in {replica.pid for replica in running.replicas()})
    wait_for(running.is_healthy)


def test_a_killed_replica_ends_only_the_streams_it_had_begun(running: Cluster, texts: list[str]) -> None:
    wait_for(lambda: len(running.replicas()) == 4)
    kills = 0
    for attempt in itertools.count():
        if kills == KILLS:
            break
        victim = running.replicas()[attempt % 4].pid
        answers, begun = asyncio.run(_under_load(running, victim))
        for i, (answer, text) in enumerate(zip(answers, texts, strict=True)):
            if i in begun:
                assert answer.errors == ["closed"] and not answer.done
                assert text.startswith(answer.text.rstrip("\ufffd"))
            else:
                assert answer.done and answer.text == text and not answer.errors
        if begun:
            kills += 1
            _wait_for_another(running, victim)


@pytest.mark.parametrize(("sent", "broken"), [([b"data: 1\n\n"], True), ([b"data: 1\n\n", DONE], False)])
def test_a_replica_that_dies_after_the_last_event_breaks_nothing(sent: list[bytes], broken: bool) -> None:
    from ray.exceptions import RayActorError

    from chameleon_deploy.serve.ray.ingress import _stream

    async def rest() -> AsyncIterator[bytes]:
        for part in sent[1:]:
            yield part
        raise RayActorError

    async def read() -> list[bytes]:
        return [part async for part in _stream(sent[0], rest())]

    parts = asyncio.run(read())
    assert parts[: len(sent)] == sent
    assert [b'"closed"' in part for part in parts[len(sent) :]] == [True] * broken


def test_a_node_goes_and_another_comes(running: Cluster, texts: list[str]) -> None:
    running.remove_node(running.nodes[1])
    running.add_node(3)
    wait_for(lambda: len(running.replicas()) == 4)
    wait_for(running.is_healthy)
    answers, _ = asyncio.run(_under_load(running))
    assert [answer.text for answer in answers] == texts

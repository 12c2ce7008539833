"""What a Ray cluster does while requests come: a rolling change of the bundle, replicas added and removed, tenants.

`make scale` runs these.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
import yaml

import chameleon_deploy
from chameleon_deploy.contract.bundle import Mode
from tests.ray_cluster import Cluster, wait_for
from tests.ray_load import TOKENS, Answer, connect, stream

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]
STREAMS = 8
DRAIN = 60  # seconds in which a stream of a replica that goes must end, however busy the machine is
PROMPTS = [f"The river number {i} of" for i in range(STREAMS)]
TENANTS = ("acme", "globex", "initech")


def _texts(bundle: Path) -> list[str]:
    runtime = chameleon_deploy.load(bundle, threads=1)
    mode: Mode | None = "centroid" if "centroid" in runtime.manifest.adaptation.modes else None
    return [runtime.generate([prompt], max_new_tokens=TOKENS, mode=mode)[0].text for prompt in PROMPTS]


def _not_as_it_should(answers: list[Answer], *texts: str) -> list[Answer]:
    """Return the answers that did not end, have an error, or have none of these texts."""
    return [answer for answer in answers if not answer.done or answer.errors or answer.text not in texts]


@contextmanager
def _load(cluster: Cluster) -> Iterator[list[list[Answer]]]:
    """Streams of all prompts, one after the other for each, and what has been answered so far."""
    answered: list[list[Answer]] = [[] for _ in PROMPTS]
    enough = Event()

    async def repeat(client: Any, prompt: str, answers: list[Answer]) -> None:
        while not enough.is_set():
            answers.append(await stream(client, prompt))

    async def run() -> None:
        async with connect(cluster.url) as client:
            await asyncio.gather(*(repeat(client, *pair) for pair in zip(PROMPTS, answered, strict=True)))

    failures: list[BaseException] = []

    def work() -> None:
        try:
            asyncio.run(run())
        except BaseException as error:
            failures.append(error)

    thread = Thread(target=work)
    thread.start()
    try:
        wait_for(lambda: all(answered) or failures)
        yield answered
    finally:
        enough.set()
        thread.join()
    assert not failures, failures


def test_another_bundle_replaces_the_first_without_losing_a_request(
    ray_cluster: Cluster, bundle: Path, lora_bundle: Path
) -> None:
    ray_cluster.deploy(bundle, replicas=4, drain_seconds=DRAIN)
    wait_for(ray_cluster.is_healthy)
    with _load(ray_cluster) as answered:
        ray_cluster.deploy(lora_bundle, replicas=4, drain_seconds=DRAIN)
        wait_for(lambda: len(ray_cluster.replicas()) == 4)
        replaced = [len(answers) for answers in answered]
        wait_for(lambda: all(len(a) > count + 1 for a, count in zip(answered, replaced, strict=True)))
    for answers, count, old, new in zip(answered, replaced, _texts(bundle), _texts(lora_bundle), strict=True):
        assert old != new
        assert _not_as_it_should(answers, old, new) == []
        assert answers[0].text == old
        assert all(answer.text == new for answer in answers[count + 1 :])  # one may have been on its way


def test_replicas_follow_the_load(ray_cluster: Cluster, bundle: Path, tmp_path: Path) -> None:
    scaling = {"min_replicas": 1, "max_replicas": 3, "target_ongoing_requests": 2, "metrics_interval_s": 1,
               "look_back_period_s": 2, "upscale_delay_s": 1, "downscale_delay_s": 2}  # fmt: skip
    application = {
        "name": "default", "route_prefix": "/", "import_path": "chameleon_deploy.serve.ray:app",
        "args": {"bundle": str(bundle), "max_replicas": 3, "rows": 2, "drain_seconds": DRAIN},
        "deployments": [{"name": "Replica", "autoscaling_config": scaling}],
    }  # fmt: skip
    file = tmp_path / "ray.yaml"
    file.write_text(yaml.safe_dump({"applications": [application]}))
    ray_cluster.run(str(file))
    wait_for(ray_cluster.is_healthy)
    wait_for(lambda: len(ray_cluster.replicas()) == 1)
    with _load(ray_cluster) as answered:
        wait_for(lambda: len(ray_cluster.replicas()) == 3)
    wait_for(lambda: len(ray_cluster.replicas()) == 1)
    for answers, text in zip(answered, _texts(bundle), strict=True):
        assert _not_as_it_should(answers, text) == []


@pytest.mark.parametrize("routing", ["load", "tenant"])
def test_the_requests_of_a_tenant_meet(ray_cluster: Cluster, bundle: Path, tmp_path: Path, routing: str) -> None:
    """In one replica and in one cohort, which no other tenant joins; by load they are scattered."""
    keys = tmp_path / "keys.json"
    keys.write_text("{" + ", ".join(f'"sk-{tenant}": "{tenant}"' for tenant in TENANTS) + "}")
    ray_cluster.deploy(
        bundle, replicas=3, routing=routing, bound=3, api_keys=keys, cohort_window_ms=2000, drain_seconds=DRAIN
    )
    wait_for(ray_cluster.is_healthy)
    prompts = {tenant: [f"{tenant} and river {i}" for i in range(4)] for tenant in TENANTS}

    async def ask(client: Any, tenant: str, prompt: str) -> dict[str, Any]:
        body = {"prompt": prompt, "mode": "tenant", "max_tokens": TOKENS, "temperature": 0}
        response = await client.post("/v1/completions", json=body, headers={"Authorization": f"Bearer sk-{tenant}"})
        found: dict[str, Any] = response.raise_for_status().json()["choices"][0]
        return found

    async def run() -> list[dict[str, Any]]:
        async with connect(ray_cluster.url) as client:
            asked = [ask(client, tenant, prompts[tenant][i]) for i in range(4) for tenant in TENANTS]
            return await asyncio.gather(*asked)

    choices = asyncio.run(run())
    sizes = [choice["chameleon"]["cohort"]["size"] for choice in choices]
    if routing == "load":
        assert max(sizes) <= 4 and min(sizes) < 4
        return
    assert sizes == [4] * len(choices)
    runtime = chameleon_deploy.load(bundle, threads=1)
    for place, tenant in enumerate(TENANTS):
        alone = runtime.generate(prompts[tenant], max_new_tokens=TOKENS, mode="tenant", tenants=[tenant] * 4)
        assert [choice["text"] for choice in choices[place :: len(TENANTS)]] == [one.text for one in alone]

"""The other endpoints: models, tokens, scores, clusters, metrics, the schema and the page.

CHAMELEON_SCHEMA_CASES=2000 asks as many questions of the schema; a run of the suite asks a few.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from chameleon_deploy.serve import app
from tests.rows import random_rows
from tests.schema_cases import asked, operations_of
from tests.serving import Running, running


def test_every_mode_is_a_model(client: openai.OpenAI, server: Running) -> None:
    names = [model.id for model in client.models.list()]
    assert names == [server.name, *(f"{server.name}:{mode}" for mode in ("none", "centroid", "request", "cohort"))]
    assert client.models.retrieve(names[1]).mode == "none"  # type: ignore[attr-defined]
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_tokens_there_and_back(server: Running) -> None:
    text = "The river, näive ☃ <|endoftext|>"
    found = server.post("/tokenize", prompt=text, return_token_strs=True).json()
    assert found["tokens"] == server.runtime.tokenizer.encode(text).ids
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    assert found["max_model_len"] == 128
    assert server.post("/detokenize", tokens=found["tokens"]).json() == {"prompt": text}
    with server.http() as http:
        info = http.get("/tokenizer_info").json()
    assert server.post("/tokenize", prompt=info["eos_token"]).json()["tokens"] == [info["eos_token_id"]]
    assert server.post("/detokenize", tokens=[600]).status_code == 422


def test_a_capacity_bounds_prompt_and_answer(bundle: Path) -> None:
    with running(bundle, rows=2, capacity=32) as server:
        assert server.post("/tokenize", prompt="a").json()["max_model_len"] == 32
        with server.http() as http:
            assert {model["max_model_len"] for model in http.get("/v1/models").json()["data"]} == {32}
        full = server.post("/v1/completions", prompt=[7] * 20, max_tokens=100, ignore_eos=True).json()
        assert full["usage"]["completion_tokens"] == 13  # the last token is not read
        refused = server.post("/v1/completions", prompt=[7] * 33, max_tokens=1)
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "text_too_long")


@pytest.mark.parametrize("mode", ["none", "centroid", "request", "cohort"])
def test_scores_are_those_of_the_runtime(server: Running, mode: Any) -> None:
    rows = [*random_rows(3, 4, 40), [5]]
    found = server.post("/v1/score", input=rows, mode=mode).json()
    expected = server.runtime.score(rows, mode=mode)
    assert found["mode"] == mode
    for item, score in zip(found["data"], expected, strict=True):
        assert item["token_logprobs"] == pytest.approx(score.token_logprobs, abs=1e-4)
        assert (item["cluster_id"], item["token_ids"]) == (score.cluster_id, score.token_ids)
    assert found["data"][-1]["perplexity"] is None


def test_a_text_is_put_among_the_clusters(server: Running) -> None:
    with server.http() as http:
        before = http.get("/v1/clusters").json()["data"]
    found = server.post("/v1/adapt", input=["The river", "A town"]).json()["data"]
    adaptation = server.runtime.adapt(["The river", "A town"], mode="none")
    for i, item in enumerate(found):
        assert item["cluster_id"] == adaptation.cluster_ids[i] == int(np.argmin(item["distances"]))
        assert item["embedding"] == pytest.approx(adaptation.embeddings[i].tolist())
        centroids = np.array([cluster["centroid"] for cluster in before])
        assert item["distances"] == pytest.approx(np.linalg.norm(centroids - item["embedding"], axis=1), abs=1e-5)
    server.post("/v1/completions", prompt="The river", max_tokens=1)
    with server.http() as http:
        after = http.get("/v1/clusters").json()["data"]
    grown = [b["size"] - a["size"] for a, b in zip(before, after, strict=True)]
    assert grown == [int(i == found[0]["cluster_id"]) for i in range(len(after))]


def metrics(server: Running) -> dict[str, float]:
    """Every sample by name and labels, as Prometheus' own parser reads them."""
    with server.http() as http:
        text = http.get("/metrics").text
    return {
        "".join([sample.name, *(f"{{{key}={value}}}" for key, value in sorted(sample.labels.items()))]): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics_count_what_happened(server: Running) -> None:
    server.wait_until_idle()
    before = metrics(server)
    body = {"prompt": [[1, 2, 3], [4, 5]], "max_tokens": 4, "n": 2, "ignore_eos": True, "mode": "none"}
    assert server.post("/v1/completions", **body).status_code == 200
    server.post("/v1/completions", prompt="a", n=0)
    server.wait_until_idle()
    after = metrics(server)

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert grown("chameleon_generation_tokens_total") == 16
    assert grown("chameleon_prompt_tokens_total") == 10
    assert grown("chameleon_request_success_total{finished_reason=length}") == 4
    assert grown("chameleon_time_to_first_token_seconds_count") == 4
    assert grown("chameleon_inter_token_latency_seconds_count") == 12
    assert grown("chameleon_e2e_request_latency_seconds_count") == 4
    assert grown("chameleon_request_queue_time_seconds_count") == 4
    assert grown("chameleon_requests_rejected_total{reason=input_invalid}") == 1
    assert sum(grown(n) for n in after if n.startswith("chameleon_requests_total{") and "{mode=none}" in n) == 2
    for name in ("step_seconds_count", "batch_rows_count", "batch_factor_sets_count"):
        assert grown(f"chameleon_{name}") >= 4
    assert grown("chameleon_prefill_seconds_count") >= 2
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "factor_sets_resident"):
        assert after[f"chameleon_{name}"] == 0
    assert {"chameleon_requests_cancelled_total", "chameleon_factor_set_hits_total"} <= set(after)


def test_the_schema_holds(server: Running) -> None:
    operations = operations_of(server)
    assert len(operations) == 18
    statuses = asked(operations)
    assert {200, 400} <= set(statuses)
    assert not any(status >= 500 for status in statuses)


def test_other_paths_and_methods_have_the_same_errors(server: Running) -> None:
    with server.http() as http:
        for answer, status, code in (
            (http.get("/v2/nothing"), 404, "not_found"),
            (http.get("/nothing"), 404, "not_found"),
            (http.get("/v1/completions"), 405, "method_not_allowed"),
            (http.get("/..%2fapp.py"), 404, "not_found"),
            (http.get("/%2e%2e/app.py"), 404, "not_found"),
        ):
            assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


def test_the_page_is_served_by_name_with_a_strict_policy(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"index.html": (b"<!doctype html>", "text/html"), "app.js": (b"1", "text/javascript")}
    monkeypatch.setattr(app, "_FILES", files)
    with server.http() as http:
        page, script = http.get("/"), http.get("/app.js")
    assert page.content == b"<!doctype html>"
    assert script.headers["content-type"].startswith("text/javascript")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy


def test_version_and_health(server: Running) -> None:
    with server.http() as http:
        assert http.get("/health").json() == {"status": "ok"}
        assert http.get("/version").json()["bundle_digest"] == server.runtime.bundle.digest


def test_a_bundle_of_regime_lora_serves_its_own_mode(lora_bundle: Path) -> None:
    with running(lora_bundle) as server:
        answer = server.post("/v1/completions", prompt="The river", max_tokens=6, temperature=0).json()
        assert answer["choices"][0]["chameleon"]["mode"] == "static"
        assert answer["choices"][0]["text"] == server.runtime.generate(["The river"], max_new_tokens=6)[0].text

"""The prefix cache over HTTP: who sees cached tokens, and who sees none."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from chameleon_deploy.runtime.decode.slots import Slots
from chameleon_deploy.serve.call import Call
from tests.serving import InThread, running

PROMPT = np.random.default_rng(5).integers(1, 512, 70).tolist()
KEYS = {"sk-a": "acme", "sk-a2": "acme", "sk-b": "bee"}


@pytest.fixture(scope="module")
def keyed(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[InThread]:
    keys = tmp_path_factory.mktemp("keys") / "keys.json"
    keys.write_text(json.dumps(KEYS))
    with running(bundle, rows=4, prefill_tokens=16, api_keys=keys, prefix_cache_bytes=2**22) as found:
        yield found


@pytest.fixture(autouse=True)
def _empty(keyed: InThread) -> None:
    keyed.served.engine.clear_prefix_cache()


def ask(server: InThread, key: str = "none", prompt: Any = PROMPT, **body: Any) -> Any:
    """Return the usage of a completion."""
    given = {"cache_salt", "cache_generated"} & body.keys()
    extra = {name: body.pop(name) for name in given}
    answer: Any = server.openai(key).completions.create(
        model=server.name, prompt=prompt, **{"max_tokens": 2, "temperature": 0} | body, extra_body=extra
    )
    if not body.get("stream"):
        return answer.usage
    *_, last = answer
    return last.usage


def cached(server: InThread, key: str = "none", prompt: Any = PROMPT, **body: Any) -> int:
    found: int = ask(server, key, prompt, **body).prompt_tokens_details.cached_tokens
    return found


def test_usage_says_what_was_cached(bundle: Path) -> None:
    with running(bundle, prefill_tokens=16, prefix_cache_bytes=2**22) as server:
        assert [cached(server), cached(server), cached(server, n=2)] == [0, 64, 64]
        assert cached(server, prompt=[PROMPT, PROMPT[:40]]) == 64 + 32
        options = {"include_usage": True}
        assert cached(server, stream=True, stream_options=options) == 64
        assert cached(server, cache_salt="mine") == 0
        assert cached(server, prompt=[*PROMPT[:48], 7, 7, 7], cache_generated=False) == 48
        with server.http() as http:
            state = http.get("/v1/cache").json()
            text = http.get("/metrics").text
            assert state["tokens"] == 128
            assert state["bytes"] <= state["max_bytes"] <= 2**22
            assert f"chameleon_prefix_cache_tokens {state['tokens']:.1f}" in text
            assert "chameleon_prefix_cache_hits_total 336.0" in text
            assert http.delete("/v1/cache").json()["tokens"] == 0
            assert http.post("/v1/cache").status_code == 405
        assert cached(server) == 0


def test_conversations_say_it_too(keyed: InThread, monkeypatch: pytest.MonkeyPatch) -> None:
    from chameleon_deploy.serve.chat import Job

    stream = keyed.served.engine.submit([PROMPT], max_new_tokens=1)
    stream.result(60)
    stream = keyed.served.engine.submit([PROMPT], max_new_tokens=1)
    stream.result(60)
    job: Any = Job("", 0, None, None, keyed.served, PROMPT, stream, None, {})  # type: ignore[arg-type]
    assert job.usage(1).prompt_tokens_details.cached_tokens == 64


def test_tenants_share_nothing(keyed: InThread) -> None:
    """Keys of one tenant do; a salt of the body parts it further, and reaches no other tenant."""
    assert [cached(keyed, key) for key in ("sk-a", "sk-a2", "sk-b", "sk-b")] == [0, 64, 0, 64]
    assert cached(keyed, "sk-b", cache_salt="4:acme:") == 0
    assert cached(keyed, "sk-a", cache_salt="x") == 0


def test_what_another_tenant_asked_costs_the_same_to_ask(keyed: InThread, monkeypatch: pytest.MonkeyPatch) -> None:
    """Time tells as much as the work does: the decoder reads the same numbers of tokens."""
    calls, prefill = list[list[int]](), Slots.prefill

    def counted(slots: Slots, first: int, rows: Any, factors: Any, num_logits: int = 0) -> Any:
        calls.append(list(map(len, rows)))
        return prefill(slots, first, rows, factors, num_logits)

    monkeypatch.setattr(Slots, "prefill", counted)

    def work(key: str, prompt: list[int]) -> list[list[int]]:
        calls.clear()
        ask(keyed, key, prompt)
        return list(calls)

    work("sk-a", PROMPT)
    never_asked = work("sk-b", PROMPT[::-1])
    assert work("sk-b", PROMPT) == never_asked
    assert work("sk-a", PROMPT) != never_asked  # who asked it herself does see it


def test_a_tenant_sees_and_empties_its_own_part(keyed: InThread) -> None:
    def state(key: str, method: str = "GET") -> dict[str, int]:
        with keyed.http() as http:
            found: dict[str, int] = http.request(method, "/v1/cache", headers={"Authorization": f"Bearer {key}"}).json()
            return found

    ask(keyed, "sk-a")
    ask(keyed, "sk-a", cache_salt="x")
    assert (state("sk-a")["tokens"], state("sk-b")["tokens"]) == (128, 0)
    assert state("sk-b", "DELETE")["tokens"] == 0
    assert state("sk-a")["tokens"] == 128
    assert state("sk-a", "DELETE")["tokens"] == 0
    assert cached(keyed, "sk-a") == 0
    with keyed.http() as http:
        assert http.get("/v1/cache").status_code == 401


def test_a_tenant_that_is_no_part_of_the_salt_is_seen(keyed: InThread, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Call, "salt", "")
    with pytest.raises(AssertionError):
        test_tenants_share_nothing(keyed)


def test_a_salt_that_is_too_long_is_refused(keyed: InThread) -> None:
    with pytest.raises(openai.BadRequestError, match="cache_salt"):
        ask(keyed, "sk-a", cache_salt="x" * 1025)


def test_scores_of_continuations_use_it(bundle: Path) -> None:
    answers = [[5, 7], [9], [300, 2, 11]]
    with running(bundle, rows=4, prefill_tokens=16, prefix_cache_bytes=2**22) as server:
        for cached in (0, 64):
            found = server.post("/v1/score", input=[PROMPT], continuations=answers, mode="none").json()["data"]
            assert [item["token_ids"] for item in found] == answers
            assert found[0]["cached_tokens"] == cached
        whole = server.post("/v1/score", input=[PROMPT + answer for answer in answers], mode="none").json()["data"]
        for item, expected in zip(found, whole, strict=True):
            own = expected["token_logprobs"][len(PROMPT) - 1 :]
            assert item["token_logprobs"] == pytest.approx(own, abs=1e-4)
            assert item["logprob"] == pytest.approx(sum(own), abs=1e-4)
            assert "cached_tokens" not in expected
        for wrong in list[Any]([[], [[]], answers * 1000, [[600]], ["a", [5]]]):
            refused = server.post("/v1/score", input=[PROMPT], continuations=wrong)
            assert refused.status_code in (400, 422)
            assert refused.json()["error"]["param"] == "continuations"
        assert server.post("/v1/score", input=[PROMPT] * 2, continuations=answers).status_code == 400

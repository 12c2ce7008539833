"""/v1/completions as the `openai` client sees it: what the runtime gives, in OpenAI's shape."""

from __future__ import annotations

import json
import math
from typing import Any

import httpx
import openai
import pytest

from chameleon_deploy import Sampling
from chameleon_deploy.serve.bodies import parse
from chameleon_deploy.serve.errors import ApiError
from chameleon_deploy.serve.schemas import CompletionRequest
from tests.rows import random_rows
from tests.serving import InThread, Running

PROMPT = "The river runs through the old town"


def complete(client: openai.OpenAI, server: Running, **fields: Any) -> Any:
    extra = {name: fields.pop(name) for name in list(fields) if name in EXTENSIONS}
    fields = {"model": server.name, "prompt": PROMPT, "temperature": 0, **fields}
    return client.completions.create(**fields, extra_body=extra)


EXTENSIONS = {
    "mode", "adapt_tokens", "top_k", "repetition_penalty", "stop_token_ids", "ignore_eos", "return_token_ids",
    "return_tokens_as_token_ids",
}  # fmt: skip


def test_a_completion_is_what_generate_gives(client: openai.OpenAI, server: Running) -> None:
    answer = complete(client, server, max_tokens=12)
    expected = server.runtime.generate([PROMPT], max_new_tokens=12, mode="centroid")[0]
    choice = answer.choices[0]
    assert (choice.text, choice.finish_reason) == (expected.text, expected.finish_reason)
    assert choice.logprobs is None
    assert answer.usage.completion_tokens == len(expected.token_ids)
    assert answer.usage.prompt_tokens == len(server.runtime.encode([PROMPT])[0])
    assert answer.system_fingerprint.endswith("-cpu-fp32")
    assert choice.chameleon == {"mode": "centroid", "cluster_id": expected.cluster_id, "cohort": None}


@pytest.mark.parametrize("mode", ["none", "centroid", "request", "cohort"])
def test_a_mode_is_a_model_and_a_field(client: openai.OpenAI, server: Running, mode: Any) -> None:
    expected = server.runtime.generate([PROMPT], max_new_tokens=8, mode=mode)[0].text
    by_name = complete(client, server, max_tokens=8, model=f"{server.name}:{mode}")
    by_field = complete(client, server, max_tokens=8, mode=mode)
    assert by_name.choices[0].text == by_field.choices[0].text == expected
    assert (by_name.choices[0].chameleon["cohort"] is not None) == (mode == "cohort")


def test_prompts_of_every_form_are_taken(client: openai.OpenAI, server: Running) -> None:
    rows = random_rows(5, 3, 20)
    texts = ["The river", PROMPT]
    for prompt, count in ((texts, 2), (rows, 3), (rows[0], 1), ("The river", 1)):
        answer = complete(client, server, prompt=prompt, max_tokens=5, return_token_ids=True)
        one = prompt if count > 1 else [prompt]
        expected = server.runtime.generate(one, max_new_tokens=5, mode="centroid")  # type: ignore[arg-type]
        assert [choice.index for choice in answer.choices] == list(range(count))
        assert [choice.text for choice in answer.choices] == [generation.text for generation in expected]
        assert [choice.token_ids for choice in answer.choices] == [generation.token_ids for generation in expected]


def test_sampling_is_that_of_the_runtime(client: openai.OpenAI, server: Running) -> None:
    sampling = Sampling(
        temperature=1.2, top_p=0.9, top_k=40, seed=7, repetition_penalty=1.2, presence_penalty=0.5,
        frequency_penalty=0.25, logit_bias={5: 3.0}, ignore_eos=True, stop_token_ids=[9],
    )  # fmt: skip
    expected = server.runtime.generate([PROMPT], max_new_tokens=16, mode="none", sampling=[sampling])[0]
    answer = complete(
        client, server, max_tokens=16, mode="none", temperature=1.2, top_p=0.9, top_k=40, seed=7,
        repetition_penalty=1.2, presence_penalty=0.5, frequency_penalty=0.25, logit_bias={"5": 3.0}, ignore_eos=True,
        stop_token_ids=[9], return_token_ids=True,
    )  # fmt: skip
    assert answer.choices[0].token_ids == expected.token_ids


def test_n_continuations_differ_and_are_reproducible(client: openai.OpenAI, server: Running) -> None:
    found = [complete(client, server, n=3, best_of=3, temperature=1.5, seed=3, max_tokens=10) for _ in range(2)]
    texts = [[choice.text for choice in answer.choices] for answer in found]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) > 1
    alone = complete(client, server, temperature=1.5, seed=3, max_tokens=10)
    assert alone.choices[0].text == texts[0][0]


def test_a_stop_string_ends_the_text_before_it(client: openai.OpenAI, server: Running) -> None:
    whole = complete(client, server, max_tokens=20, ignore_eos=True).choices[0].text
    stop = whole[4:6]
    choice = complete(client, server, max_tokens=20, ignore_eos=True, stop=["\x00", stop]).choices[0]
    assert (choice.text, choice.finish_reason) == (whole[: whole.index(stop)], "stop")


def test_logprobs_are_those_of_the_engine(client: openai.OpenAI, server: Running) -> None:
    sampling = Sampling(temperature=1.0, seed=1, logprobs=5, ignore_eos=True)
    expected = server.runtime.generate([PROMPT], max_new_tokens=9, mode="centroid", sampling=[sampling])[0]
    found = complete(
        client, server, max_tokens=9, temperature=1, seed=1, logprobs=5, ignore_eos=True,
        return_tokens_as_token_ids=True,
    ).choices[0].logprobs  # fmt: skip
    assert found.tokens == [f"token_id:{token_id}" for token_id in expected.token_ids]
    assert found.token_logprobs == pytest.approx(expected.token_logprobs, abs=1e-4)
    for token, logprob, top in zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True):
        assert top[token] == logprob
        assert len(top) in (5, 6)


def test_echo_gives_the_scores_of_the_prompt(client: openai.OpenAI, server: Running) -> None:
    """As lm-evaluation-harness asks for them: n + 1 entries, the first null."""
    rows = [ids for ids in random_rows(9, 6, 60) if len(ids) > 1] + [[7]]
    answer = complete(client, server, prompt=rows, max_tokens=1, logprobs=1, echo=True)
    for ids, choice in zip(rows, answer.choices, strict=True):
        logprobs = choice.logprobs
        score = server.runtime.score([ids], mode="centroid")[0]
        assert len(logprobs.tokens) == len(ids) + 1
        assert logprobs.token_logprobs[0] is None and logprobs.top_logprobs[0] is None
        assert logprobs.token_logprobs[1:-1] == pytest.approx(score.token_logprobs, abs=1e-4)


def test_the_greedy_test_compares_equal_floats(client: openai.OpenAI, server: Running) -> None:
    ids = server.runtime.encode([PROMPT])[0]
    generation = server.runtime.generate([ids], max_new_tokens=10, mode="none", sampling=Sampling(ignore_eos=True))[0]
    answer = complete(
        client, server, prompt=ids + generation.token_ids, max_tokens=1, logprobs=1, echo=True, mode="none"
    )
    logprobs = answer.choices[0].logprobs
    for logprob, top in list(zip(logprobs.token_logprobs, logprobs.top_logprobs, strict=True))[len(ids) :]:
        assert logprob == max(top.values())


def test_a_last_token_that_ends_the_text_has_its_entry(client: openai.OpenAI, server: Running) -> None:
    eos = server.runtime.manifest.model.eos_token_id
    answer = complete(client, server, max_tokens=1, logprobs=0, echo=True, logit_bias={str(eos): 100})
    choice = answer.choices[0]
    assert choice.finish_reason == "stop"
    assert choice.text == PROMPT
    assert len(choice.logprobs.tokens) == len(server.runtime.encode([PROMPT])[0]) + 1
    assert choice.logprobs.token_logprobs[-1] < 0


def test_echo_without_new_tokens(client: openai.OpenAI, server: Running) -> None:
    answer = complete(client, server, max_tokens=0, echo=True, logprobs=2)
    choice, ids = answer.choices[0], server.runtime.encode([PROMPT])[0]
    assert (choice.text, choice.finish_reason, answer.usage.completion_tokens) == (PROMPT, "length", 0)
    assert len(choice.logprobs.tokens) == len(ids)
    assert "".join(choice.logprobs.tokens) == PROMPT
    starts = choice.logprobs.text_offset
    assert [
        PROMPT[start:stop] for start, stop in zip(starts, [*starts[1:], None], strict=True)
    ] == choice.logprobs.tokens


def test_only_the_first_tokens_adapt(client: openai.OpenAI, server: Running) -> None:
    ids = random_rows(13, 1, 60)[0]
    fields = {"prompt": ids, "max_tokens": 1, "logprobs": 0, "echo": True, "mode": "request"}
    few, all_ = (complete(client, server, **fields, **more) for more in ({"adapt_tokens": 1}, {}))
    assert few.choices[0].logprobs.token_logprobs[1:] != all_.choices[0].logprobs.token_logprobs[1:]
    score = server.runtime.score([ids], mode="request")[0]
    assert all_.choices[0].logprobs.token_logprobs[1:-1] == pytest.approx(score.token_logprobs, abs=1e-4)


def test_a_stream_says_the_same_as_a_whole_answer(client: openai.OpenAI, server: Running) -> None:
    fields: dict[str, Any] = {"max_tokens": 12, "n": 2, "temperature": 1, "seed": 5, "logprobs": 1, "echo": True}
    whole = complete(client, server, **fields)
    chunks = list(complete(client, server, **fields, stream=True, stream_options={"include_usage": True}))
    for choice in whole.choices:
        parts = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert "".join(part.text for part in parts) == choice.text
        assert [t for part in parts for t in part.logprobs.tokens] == choice.logprobs.tokens
        assert [part.finish_reason for part in parts][-1] == choice.finish_reason
        assert all(part.finish_reason is None for part in parts[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_continuous_usage_counts_up(client: openai.OpenAI, server: Running) -> None:
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(complete(client, server, max_tokens=5, ignore_eos=True, stream=True, stream_options=options))
    assert [chunk.usage.completion_tokens for chunk in chunks] == [1, 2, 3, 4, 5, 5]


def test_a_stream_ends_with_done(server: Running) -> None:
    answer = server.post("/v1/completions", prompt=PROMPT, max_tokens=3, stream=True)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert events[-1] == "[DONE]"
    assert all(json.loads(event)["choices"] for event in events[:-1])


def test_token_names_are_unique(server: InThread) -> None:
    names = [server.served.names[i] for i in range(server.runtime.manifest.model.vocab_size)]
    assert len(set(names)) == len(names)
    assert any(name.startswith("bytes:\\x") for name in names)


@pytest.mark.parametrize(
    ("fields", "status", "code", "param"),
    [
        ({"n": 0}, 400, "input_invalid", "n"),
        ({"n": True}, 400, "input_invalid", "n"),
        ({"temperature": -1}, 400, "input_invalid", "temperature"),
        ({"temperature": 1e-9}, 400, "input_invalid", "temperature"),
        ({"max_tokens": 0}, 400, "input_invalid", "max_tokens"),
        ({"best_of": 3}, 400, "input_invalid", "best_of"),
        ({"suffix": "end"}, 400, "input_invalid", "suffix"),
        ({"stop": list("abcde")}, 400, "input_invalid", "stop"),
        ({"stop": ""}, 400, "input_invalid", "stop"),
        ({"logprobs": 6}, 400, "input_invalid", "logprobs"),
        ({"logit_bias": {"5": 101}}, 400, "input_invalid", "logit_bias"),
        ({"logit_bias": {"900": 1}}, 400, "token_invalid", "logit_bias"),
        ({"logit_bias": {"x": 1}}, 400, "input_invalid", "logit_bias"),
        ({"stream_options": {"include_usage": True}}, 400, "input_invalid", "stream_options"),
        ({"mode": "tenant"}, 400, "mode_unavailable", "mode"),
        ({"mode": "static"}, 400, "mode_unavailable", "mode"),
        ({"mode": "wild"}, 400, "input_invalid", "mode"),
        ({"prompt": ""}, 400, "input_invalid", "prompt"),
        ({"prompt": []}, 400, "input_invalid", "prompt"),
        ({"prompt": ["a", [1]]}, 400, "input_invalid", "prompt"),
        ({"prompt": [[1] * 200]}, 400, "text_too_long", "prompt"),
        ({"prompt": [[600]]}, 422, "token_invalid", "prompt"),
        ({"prompt": [[-1]]}, 422, "token_invalid", "prompt"),
        ({"prompt": [[1]] * 300}, 400, "input_invalid", "prompt"),
        ({"n": 128, "prompt": [[1]] * 9}, 400, "input_invalid", "n"),
        ({"model": "other"}, 404, "model_not_found", "model"),
        ({"adapt_tokens": 0}, 400, "input_invalid", "adapt_tokens"),
    ],
)  # fmt: skip
def test_a_field_that_cannot_be_honoured(
    server: Running, fields: dict[str, Any], status: int, code: str, param: str
) -> None:
    answer = server.post("/v1/completions", **{"prompt": PROMPT, **fields})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (status, code), error
    assert error["param"] == param
    assert set(error) == {"message", "type", "param", "code"}


def test_errors_are_the_clients_typed_exceptions(client: openai.OpenAI, server: Running) -> None:
    for fields, type_ in (
        ({"n": 0}, openai.BadRequestError),
        ({"model": "other"}, openai.NotFoundError),
        ({"prompt": [[600]]}, openai.UnprocessableEntityError),
    ):
        with pytest.raises(type_) as caught:
            complete(client, server, **fields)
        assert caught.value.code in ("input_invalid", "model_not_found", "token_invalid")


def test_unknown_fields_and_nulls_are_ignored(server: Running) -> None:
    nothing = dict.fromkeys(("suffix", "stop", "logprobs", "seed", "n", "user", "logit_bias", "max_tokens"))
    answer = server.post("/v1/completions", prompt=PROMPT, flavour="mint", **nothing)
    assert answer.status_code == 200
    assert answer.json()["usage"]["completion_tokens"] <= 16


@pytest.mark.parametrize(
    ("param", "value"),
    [
        *(("prompt", value) for value in ("3", '["a", 1.5]', '["a", true]', '[[1, "b"]]')),
        *(("n", value) for value in ("1.0", "129", '"x"')),
        *(("temperature", value) for value in ('"x"', "-0.5")),
        *(("top_p", value) for value in ("0", "2")),
        *(("stop", value) for value in ("5", '["a", 5]')),
        *(("logit_bias", value) for value in ('{"05": 1}', '{"5": "a"}', "[]")),
        *(("stop_token_ids", value) for value in ("[-1]", "3")),
        *(("stream_options", value) for value in ("[]", '{"include_usage": 3}')),
        ("mode", "3"), ("stream", "1"), ("logprobs", "true"), ("user", "3"), ("top_k", "-2"),
        ("repetition_penalty", "0"), ("seed", '"x"'), ("suffix", "[]"), ("presence_penalty", "2.5"), ("best_of", "0"),
        ("max_tokens", "-1"), ("model", "3"),
    ],
)  # fmt: skip
def test_a_field_of_a_wrong_type_or_range_is_named(param: str, value: str) -> None:
    others = "" if param == "prompt" else '"prompt": "a", '
    with pytest.raises(ApiError) as caught:
        parse(f'{{{others}"{param}": {value}}}'.encode(), CompletionRequest)
    assert (caught.value.status, caught.value.code, caught.value.param) == (400, "input_invalid", param)


@pytest.mark.parametrize("raw", [b"", b"[]", b"3", b"{", b"\xff", b"[" * 100_000, b'{"prompt": "\\ud800"}'])
def test_what_is_no_request_is_refused(server: Running, raw: bytes) -> None:
    with server.http() as client:
        answer = client.post("/v1/completions", content=raw)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "input_invalid")


def test_minus_infinity_is_a_number(server: InThread) -> None:
    from chameleon_deploy.runtime.sampling import Choice
    from chameleon_deploy.serve.logprobs import LogprobsWriter

    written = LogprobsWriter(server.runtime.tokenizer, str).write([Choice(5, -math.inf, ((5, -math.inf),))])
    assert (written.token_logprobs, written.top_logprobs) == ([-9999.0], [{"5": -9999.0}])


def test_a_request_id_is_kept(server: Running) -> None:
    with server.http() as client:
        headers = {"X-Request-Id": "mine-1"}
        answer = client.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 1}, headers=headers)
        assert answer.headers["x-request-id"] == "mine-1"
        assert answer.json()["id"] == "cmpl-mine-1"
        other = client.get("/health", headers={"X-Request-Id": "a b\tc"})
    assert isinstance(other, httpx.Response) and other.headers["x-request-id"] != "a b\tc"

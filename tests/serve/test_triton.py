"""A model of Triton's Python backend, in a real tritonserver. `make scale` runs these."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import chameleon_deploy
from tests.triton_server import Reader, Server, inputs, serving

pytestmark = [pytest.mark.triton, pytest.mark.timeout(300)]
REQUESTS = 1000
TOKENS = 12


@pytest.fixture(scope="module")
def server(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(bundle, tmp_path_factory.mktemp("triton")) as found:
        yield found


def test_a_thousand_streams_equal_the_runtime(server: Server, bundle: Path) -> None:
    runtime, reader, client = chameleon_deploy.load(bundle, mode="centroid", threads=1), Reader(), server.client()
    prompts = [f"The river {i % 100} of" for i in range(REQUESTS)]
    expected = {prompt: runtime.generate([prompt], max_new_tokens=TOKENS)[0] for prompt in set(prompts)}
    client.start_stream(reader)
    for i, prompt in enumerate(prompts):
        tensors = inputs(text_input=prompt, max_tokens=TOKENS, temperature=0)
        client.async_stream_infer(server.model, tensors, request_id=str(i))
    assert sorted(reader.ended.get(timeout=120) for _ in prompts) == sorted(map(str, range(REQUESTS)))
    client.stop_stream()
    for i, prompt in enumerate(prompts):
        assert reader.tokens[str(i)][0] == expected[prompt].token_ids
        assert reader.texts[str(i)] == expected[prompt].text


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"mode": "nonsense"}, "[mode_unavailable]"),
        ({"max_tokens": 0}, "[input_invalid]"),
        ({"sampling_parameters": "[1]"}, "[input_invalid]"),
        ({"sampling_parameters": '{"logit_bias": {"a": 1}}'}, "[input_invalid]"),
        ({"temperature": -1}, "[input_invalid]"),
        ({"text_input": "river " * 1000}, "[text_too_long]"),
        ({"sampling_parameters": '{"lora_name": "nobody"}'}, "[adapter_invalid]"),
    ],
)
def test_a_bad_request_harms_nobody(server: Server, fault: dict[str, Any], message: str) -> None:
    reader, client = Reader(), server.client()
    client.start_stream(reader)
    client.async_stream_infer(server.model, inputs(text_input="The river", max_tokens=TOKENS), request_id="good")
    client.async_stream_infer(server.model, inputs(**{"text_input": "The river", **fault}), request_id="bad")
    ended = [reader.ended.get(timeout=60) for _ in range(2)]
    client.stop_stream()
    (error,) = (one for one in ended if one != "good")
    assert message in error.message() and reader.tokens["good"]


def test_cancelled_requests_make_room(server: Server) -> None:
    """Enough rows to fill the queue for much longer than the next request may take."""
    client, reader = server.client(), Reader()
    client.start_stream(reader)
    for i in range(1000):
        client.async_stream_infer(server.model, inputs(text_input=f"Cancel {i}", max_tokens=120), request_id=str(i))
    while not reader.tokens:
        time.sleep(0.01)
    client.stop_stream(cancel_requests=True)
    assert len(reader.texts) < 1000
    after, reader = server.client(), Reader()
    after.start_stream(reader)
    after.async_stream_infer(server.model, inputs(text_input="The river", max_tokens=2), request_id="next")
    assert reader.ended.get(timeout=10) == "next"
    after.stop_stream()

"""The sentence encoder over HTTP: embeddings in OpenAI's form, and descriptions of tasks in requests."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from chameleon_deploy.export.exporter import export_bundle
from chameleon_deploy.reference.source import add_encoder
from chameleon_deploy.reference.text_to_lora import TextToLoraFiles, load_text_to_lora
from chameleon_deploy.reference.tiny import save_base
from tests.families import small_model
from tests.sentence_encoders import save_encoder
from tests.serving import Running, running
from tests.text_to_lora import ORDERS, SIZE, case_directory

TEXTS = ["the court finds", "write code"]


@pytest.fixture(scope="module")
def server(llama_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    path = tmp_path_factory.mktemp("embeddings")
    save_base(small_model("llama"), Tokenizer.from_file(str(llama_path / "base" / "tokenizer.json")), path / "base")
    checkpoint = load_text_to_lora(
        str(path / "base"), TextToLoraFiles(case_directory("trained"), ORDERS["trained"])
    )  # fmt: skip
    add_encoder(checkpoint, save_encoder(path / "encoder"))
    export_bundle(checkpoint, path / "told")
    with running(path / "told") as found:
        yield found


def expected(server: Running, texts: Any = TEXTS) -> Any:
    encoder = server.runtime.encoder
    assert encoder is not None
    return encoder.embed(encoder.encode(texts))


def test_embeddings_in_every_form(server: Running) -> None:
    client = server.openai()
    for encoding_format in ("float", "base64"):  # the client decodes base64, which it asks for by itself
        answer = client.embeddings.create(model="told", input=TEXTS, encoding_format=encoding_format)
        found = [
            np.frombuffer(base64.b64decode(item.embedding), "<f4")
            if isinstance(item.embedding, str)
            else item.embedding
            for item in answer.data
        ]
        np.testing.assert_allclose(found, expected(server), rtol=1e-6)
        assert [item.index for item in answer.data] == [0, 1]
        assert answer.usage.prompt_tokens == answer.usage.total_tokens == 3 + 2 + 4
    encoder = server.runtime.encoder
    assert encoder is not None
    ids = encoder.encode(TEXTS)
    for form, rows in ((TEXTS[0], [0]), (ids[1], [1]), (ids, [0, 1])):
        data = server.post("/v1/embeddings", input=form, dimensions=SIZE).json()["data"]
        np.testing.assert_allclose([item["embedding"] for item in data], expected(server)[rows], rtol=1e-6)


@pytest.mark.parametrize(
    ("body", "status", "param", "message"),
    [
        ({"input": TEXTS, "dimensions": 3}, 400, "dimensions", "have 6 numbers"),
        ({"input": TEXTS, "encoding_format": "hex"}, 400, "encoding_format", "Invalid enum value"),
        ({"input": []}, 400, "input", "the batch is empty"),
        ({"input": ["x", ""]}, 400, "input", "text 1 is empty"),
        ({"input": [99]}, 422, "input", "token id 99 is outside the vocabulary of 18"),
        ({"input": "x " * 31}, 400, "input", "31 tokens, the model has 30 positions"),
        ({"input": "x", "model": "other"}, 404, "model", "other"),
    ],
    ids=str,
)
def test_what_cannot_be_embedded(body: dict[str, Any], status: int, param: str, message: str, server: Running) -> None:
    answer = server.post("/v1/embeddings", **body)
    assert answer.status_code == status
    assert answer.json()["error"]["param"] == param
    assert message in answer.json()["error"]["message"]


def test_descriptions_in_requests(server: Running) -> None:
    prompts, told = ["The river", "A lamp"], ["answer like a lawyer", "write code"]
    wanted = [row.text for row in server.runtime.generate(prompts, adapt_text=told, max_new_tokens=6)]
    body: dict[str, Any] = {"prompt": prompts, "max_tokens": 6, "temperature": 0, "adapt_text": told}
    assert [choice["text"] for choice in server.post("/v1/completions", **body).json()["choices"]] == wanted
    scores = server.post("/v1/score", input=prompts, adapt_text=told[0]).json()["data"]
    for score, found in zip(server.runtime.score(prompts, adapt_text=told[0]), scores, strict=True):
        np.testing.assert_allclose(found["token_logprobs"], score.token_logprobs, atol=1e-5)
    refused = server.post("/v1/completions", **body | {"adapt_text": told[:1]}).json()["error"]
    assert (refused["param"], refused["code"]) == ("adapt_text", "input_invalid")


def test_a_bundle_without_an_encoder(lora_bundle: Path) -> None:
    with running(lora_bundle) as server:
        answer = server.post("/v1/embeddings", input="x")
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "mode_unavailable")
        refused = server.post("/v1/completions", prompt="x", adapt_text="x").json()["error"]
        assert (refused["param"], refused["code"]) == ("adapt_text", "mode_unavailable")

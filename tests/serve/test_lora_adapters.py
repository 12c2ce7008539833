"""Adapters over HTTP: chosen as models, loaded and unloaded while others are served."""

from __future__ import annotations

import contextlib
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from chameleon_deploy.adapter_file import write_adapter
from chameleon_deploy.export.exporter import export_bundle
from chameleon_deploy.reference.adapters import load_adapted
from tests.adapters import save_adapter
from tests.serving import InThread, Running, running, running_cpp

LAYERS = ["q_proj", "v_proj"]
PROMPT = "def main"


@pytest.fixture(scope="module")
def adapters(llama_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[InThread]:
    """A server of a bundle named wiki with one adapter, and a directory with the files of two others."""
    path, base = tmp_path_factory.mktemp("adapters"), llama_path / "base"
    directories = {
        name: save_adapter(base, path / name, seed, 0.3, r=4, target_modules=LAYERS)
        for seed, name in enumerate(("legal", "code", "poems"))
    }
    everything = load_adapted(str(base), directories)
    own = load_adapted(str(base), {"legal": directories["legal"]}, everything.trunk)
    spec = export_bundle(own, path / "wiki", None).adaptation
    (path / "files").mkdir()
    for name in ("code", "poems"):
        write_adapter(path / "files" / f"{name}.safetensors", everything.adapters[name], spec)
    write_adapter(path / "outside.safetensors", everything.adapters["code"], spec)
    (path / "files" / "broken.safetensors").write_bytes(b"no adapter")
    with running(path / "wiki", rows=4, prefill_tokens=16, adapters=path / "files", max_adapter_bytes=1) as found:
        yield found


def text_of(server: Running, model: str) -> str:
    completion = server.openai().completions.create(model=model, prompt=PROMPT, max_tokens=12, temperature=0)
    assert completion.model == model
    return completion.choices[0].text


def expected(server: Running, adapter: str | None) -> str:
    return server.runtime.generate([PROMPT], adapters=[adapter], max_new_tokens=12)[0].text


def test_an_adapter_is_a_model(program: str, adapters: Running) -> None:
    with contextlib.ExitStack() as opened:
        server = adapters
        if program == "cpp":
            server = opened.enter_context(running_cpp(adapters.runtime.bundle.path))
        names = [model.id for model in server.openai().models.list().data]
        assert names == ["wiki", "wiki:none", "wiki:legal"]
        assert text_of(server, "wiki:legal") == expected(server, "legal")
        assert text_of(server, "wiki") == text_of(server, "wiki:none") == expected(server, None)
        assert text_of(server, "wiki:legal") != text_of(server, "wiki")
        with pytest.raises(openai.NotFoundError):
            text_of(server, "wiki:static")
        logprobs = [
            server.openai().completions.create(
                model=model, prompt=PROMPT, max_tokens=0, echo=True, logprobs=0
            ).choices[0].logprobs
            for model in ("wiki", "wiki:legal")
        ]  # fmt: skip
        assert logprobs[0] and logprobs[1] and logprobs[0].token_logprobs != logprobs[1].token_logprobs
    assert adapters.post("/v1/completions", model="wiki:legal", mode="none", prompt="a").status_code == 400


def test_scores_have_the_models_adapter(adapters: Running) -> None:
    body = adapters.post("/v1/score", model="wiki:legal", input="def main(): pass").json()
    (score,) = adapters.runtime.score(["def main(): pass"], adapters=["legal"])
    assert body["data"][0]["token_logprobs"] == pytest.approx(score.token_logprobs, abs=1e-4)
    echoed = adapters.post(
        "/v1/completions", model="wiki:legal", prompt="def main(): pass", max_tokens=0, echo=True, logprobs=0
    ).json()
    found = echoed["choices"][0]["logprobs"]["token_logprobs"]
    assert found[1:] == pytest.approx(score.token_logprobs, abs=1e-4)


def test_files_are_loaded_and_unloaded(adapters: Running) -> None:
    for name in ("code", "poems"):  # one byte of them may stay in memory: both are read again and again
        answer = adapters.post("/v1/load_lora_adapter", lora_name=name, lora_path=f"{name}.safetensors")
        assert (answer.status_code, answer.json()["id"]) == (200, f"wiki:{name}")
    texts = {name: text_of(adapters, f"wiki:{name}") for name in ("code", "poems", "legal")}
    assert texts == {name: expected(adapters, name) for name in texts}
    assert len(set(texts.values())) == 3
    again = adapters.post("/v1/load_lora_adapter", lora_name="code", lora_path="code.safetensors")
    assert (again.status_code, again.json()["error"]["code"]) == (400, "adapter_invalid")
    for name in ("code", "poems"):
        assert adapters.post("/v1/unload_lora_adapter", lora_name=name).status_code == 200
        with pytest.raises(openai.NotFoundError):
            text_of(adapters, f"wiki:{name}")
    assert adapters.post("/v1/unload_lora_adapter", lora_name="code").status_code == 400


@pytest.mark.parametrize(
    "path", ["../outside.safetensors", "/etc/passwd", "missing.safetensors", "broken.safetensors", "", ".", "a/b", "\0"]
)
def test_a_hostile_path_loads_nothing(path: str, adapters: Running) -> None:
    answer = adapters.post("/v1/load_lora_adapter", lora_name="code", lora_path=path)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] in ("path_unsafe", "adapter_invalid")
    assert adapters.runtime.adapters.names == ["legal"]


@pytest.mark.parametrize("name", ["", "none", "a/b", "wiki:code", "x" * 65])
def test_a_name_that_no_model_may_have(name: str, adapters: Running) -> None:
    answer = adapters.post("/v1/load_lora_adapter", lora_name=name, lora_path="code.safetensors")
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "input_invalid")


def test_a_file_that_changes_under_the_server_is_refused(adapters: InThread) -> None:
    directory = adapters.served.adapter_files
    assert directory is not None
    shutil.copy(directory / "code.safetensors", directory / "changing.safetensors")
    shutil.copy(directory / "poems.safetensors", directory / "newer.safetensors")
    for name, file in (("changing", "changing"), ("poems", "poems")):
        adapters.post("/v1/load_lora_adapter", lora_name=name, lora_path=f"{file}.safetensors")
    (directory / "newer.safetensors").replace(directory / "changing.safetensors")
    answer = adapters.post("/v1/completions", model="wiki:changing", prompt="a")
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "adapter_invalid")
    for name in ("changing", "poems"):
        adapters.post("/v1/unload_lora_adapter", lora_name=name)


def test_no_request_is_lost_while_adapters_come_and_go(adapters: Running) -> None:
    wanted = {"wiki": expected(adapters, None), "wiki:legal": expected(adapters, "legal")}
    wrong: list[tuple[str, str]] = []

    def ask(model: str) -> None:
        for _ in range(2):
            found = text_of(adapters, model)
            if found != wanted[model]:
                wrong.append((model, found))

    threads = [threading.Thread(target=ask, args=(list(wanted)[i % 2],)) for i in range(32)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        for path, body in (("load", {"lora_path": "code.safetensors"}), ("unload", {})):
            assert adapters.post(f"/v1/{path}_lora_adapter", lora_name="code", **body).status_code == 200
    assert not wrong


def test_without_the_option_nothing_is_loaded(python_server: Running) -> None:
    answer = python_server.post("/v1/load_lora_adapter", lora_name="code", lora_path="code.safetensors")
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "adapters_fixed")
    assert python_server.post("/v1/unload_lora_adapter", lora_name="code").status_code == 403

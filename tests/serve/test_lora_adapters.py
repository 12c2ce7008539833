"""Adapters over HTTP: chosen as models, loaded and unloaded while others are served."""

from __future__ import annotations

import re
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import openai
import pytest

import chameleon_deploy
from chameleon_deploy import Runtime
from chameleon_deploy.contract.adapter_file import write_adapter
from chameleon_deploy.export.exporter import export_bundle
from chameleon_deploy.reference.adapters import load_adapted
from tests.adapters import save_adapter
from tests.serving import SECONDS, InThread, Running, running, wait_for

if TYPE_CHECKING:
    from tests.ray_cluster import Cluster

LAYERS = ["q_proj", "v_proj"]
PROMPT = "def main"


@pytest.fixture(scope="module")
def path(llama_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a bundle named wiki that has one adapter, and the files of two others."""
    path, base = tmp_path_factory.mktemp("adapters"), llama_path / "base"
    directories = {
        name: save_adapter(base, path / name, seed, 0.3, r=4, target_modules=LAYERS)
        for seed, name in enumerate(("legal", "code", "poems"))
    }
    everything = load_adapted(str(base), directories)
    own = load_adapted(str(base), {"legal": directories["legal"]}, everything.trunk)
    spec = export_bundle(own, path / "wiki").adaptation
    (path / "files").mkdir()
    for name in ("code", "poems"):
        write_adapter(path / "files" / f"{name}.safetensors", everything.adapters[name], spec)
    write_adapter(path / "outside.safetensors", everything.adapters["code"], spec)
    (path / "files" / "broken.safetensors").write_bytes(b"no adapter")
    return path


@pytest.fixture(scope="module")
def runtime(path: Path) -> Runtime:
    """All three adapters in the library, which gives the results that the servers must give."""
    runtime = chameleon_deploy.load(path / "wiki", threads=1)
    for name in ("code", "poems"):
        runtime.load_adapter(name, path / "files" / f"{name}.safetensors")
    return runtime


@pytest.fixture(scope="module")
def adapters(path: Path) -> Iterator[Running]:
    """One byte of loaded adapters may stay in memory: they are read again and again."""
    with running(
        path / "wiki", rows=4, prefill_tokens=16, adapters=[str(path / "files")], max_adapter_bytes=1
    ) as found:  # fmt: skip
        yield found


def text_of(server: Running, model: str) -> str:
    completion = server.openai().completions.create(model=model, prompt=PROMPT, max_tokens=12, temperature=0)
    assert completion.model == model
    return completion.choices[0].text


def expected(runtime: Runtime, adapter: str | None) -> str:
    return runtime.generate([PROMPT], adapters=[adapter], max_new_tokens=12)[0].text


def models(server: Running) -> list[str]:
    return [model.id for model in server.openai().models.list().data]


def test_an_adapter_is_a_model(adapters: Running, runtime: Runtime) -> None:
    assert models(adapters) == ["wiki", "wiki:none", "wiki:legal"]
    assert text_of(adapters, "wiki:legal") == expected(runtime, "legal")
    assert text_of(adapters, "wiki") == text_of(adapters, "wiki:none") == expected(runtime, None)
    assert text_of(adapters, "wiki:legal") != text_of(adapters, "wiki")
    with pytest.raises(openai.NotFoundError):
        text_of(adapters, "wiki:static")
    assert adapters.post("/v1/completions", model="wiki:legal", mode="none", prompt="a").status_code == 400


def test_the_prompts_log_probabilities_have_the_models_adapter(adapters: Running, runtime: Runtime) -> None:
    (score,) = runtime.score(["def main(): pass"], adapters=["legal"])
    echoed = adapters.post(
        "/v1/completions", model="wiki:legal", prompt="def main(): pass", max_tokens=0, echo=True, logprobs=0
    ).json()
    found = echoed["choices"][0]["logprobs"]["token_logprobs"]
    assert found[1:] == pytest.approx(score.token_logprobs, abs=1e-4)


def test_scores_have_the_models_adapter(path: Path, runtime: Runtime) -> None:
    with running(path / "wiki") as server:
        body = server.post("/v1/score", model="wiki:legal", input="def main(): pass").json()
    (score,) = runtime.score(["def main(): pass"], adapters=["legal"])
    assert body["data"][0]["token_logprobs"] == pytest.approx(score.token_logprobs, abs=1e-4)


def test_files_are_loaded_and_unloaded(adapters: Running, runtime: Runtime) -> None:
    for name in ("code", "poems"):
        answer = adapters.post("/v1/load_lora_adapter", lora_name=name, lora_path=f"{name}.safetensors")
        assert (answer.status_code, answer.json()["id"]) == (200, f"wiki:{name}")
    assert models(adapters) == ["wiki", "wiki:none", "wiki:legal", "wiki:code", "wiki:poems"]
    texts = {name: text_of(adapters, f"wiki:{name}") for name in ("code", "poems", "legal")}
    assert texts == {name: expected(runtime, name) for name in texts}
    assert len(set(texts.values())) == 3
    again = adapters.post("/v1/load_lora_adapter", lora_name="code", lora_path="code.safetensors")
    assert (again.status_code, again.json()["error"]["code"]) == (400, "adapter_invalid")
    for name in ("code", "poems"):
        assert adapters.post("/v1/unload_lora_adapter", lora_name=name).status_code == 200
        with pytest.raises(openai.NotFoundError):
            text_of(adapters, f"wiki:{name}")
    assert adapters.post("/v1/unload_lora_adapter", lora_name="code").status_code == 400


@pytest.mark.parametrize(
    "lora_path",
    ["../outside.safetensors", "/etc/passwd", "missing.safetensors", "broken.safetensors", "", ".", "a/b", "\0"],
)
def test_a_hostile_path_loads_nothing(lora_path: str, adapters: Running) -> None:
    answer = adapters.post("/v1/load_lora_adapter", lora_name="code", lora_path=lora_path)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] in ("path_unsafe", "adapter_invalid")
    assert models(adapters) == ["wiki", "wiki:none", "wiki:legal"]


@pytest.mark.parametrize("name", ["", "none", "a/b", "wiki:code", "x" * 65])
def test_a_name_that_no_model_may_have(name: str, adapters: Running) -> None:
    answer = adapters.post("/v1/load_lora_adapter", lora_name=name, lora_path="code.safetensors")
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "input_invalid")


def test_a_file_that_changes_under_the_server_is_refused(adapters: Running, path: Path) -> None:
    directory = path / "files"
    shutil.copy(directory / "code.safetensors", directory / "changing.safetensors")
    shutil.copy(directory / "poems.safetensors", directory / "newer.safetensors")
    for name, file in (("changing", "changing"), ("poems", "poems")):
        adapters.post("/v1/load_lora_adapter", lora_name=name, lora_path=f"{file}.safetensors")
    (directory / "newer.safetensors").replace(directory / "changing.safetensors")
    answer = adapters.post("/v1/completions", model="wiki:changing", prompt="a")
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "adapter_invalid")
    for name in ("changing", "poems"):
        adapters.post("/v1/unload_lora_adapter", lora_name=name)


def test_no_request_is_lost_while_adapters_come_and_go(adapters: Running, runtime: Runtime) -> None:
    wanted = {"wiki": expected(runtime, None), "wiki:legal": expected(runtime, "legal")}
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


@pytest.fixture(scope="module")
def keyed(path: Path) -> Iterator[Running]:
    """Alice may load adapters, Bob may not."""
    keys = path / "keys.json"
    keys.write_text(
        '{"sk-a": {"tenant": "alice", "rights": ["load_adapters"]}, "sk-b": "bob", "sk-c": {"tenant": "c"}}'
    )
    with running(path / "wiki", adapters=[str(path / "files")], api_keys=keys) as server:
        yield server


def as_key(server: Running, key: str, path: str, **body: Any) -> httpx.Response:
    headers = {"Authorization": f"Bearer {key}"}
    return httpx.post(f"{server.url}/v1/{path}", json=body, headers=headers, timeout=60)


def test_metrics_and_logs_tell_each_adapters_use(keyed: Running, caplog: pytest.LogCaptureFixture) -> None:
    def counted() -> dict[str, float]:
        text = httpx.get(f"{keyed.url}/metrics").text
        found = re.findall(r'^chameleon_adapter_(\w+)\{adapter="(\w+)"\} (\S+)', text, re.MULTILINE)
        return {f"{name} {adapter}": float(value) for name, adapter, value in found}

    as_key(keyed, "sk-a", "load_lora_adapter", lora_name="poems", lora_path="poems.safetensors")
    before = counted()
    rows: list[Any] = ["legal", {"legal": 0.5, "poems": 0.5}, None]
    caplog.set_level("INFO", "chameleon_deploy.serve")
    body = {"prompt": [[1, 2, 3]] * 3, "max_tokens": 4, "ignore_eos": True, "temperature": 0}
    assert as_key(keyed, "sk-b", "completions", adapters=rows, **body).status_code == 200
    keyed.wait_until_idle()
    after = counted()
    grown = {name: after[name] - before.get(name, 0) for name in after if "created" not in name}
    for name, legal, poems in (
        ("requests_total", 2, 1), ("prompt_tokens_total", 6, 3), ("generation_tokens_total", 8, 4),
        ("time_to_first_token_seconds_count", 2, 1), ("request_queue_time_seconds_count", 2, 1),
    ):  # fmt: skip
        assert (grown[f"{name} legal"], grown[f"{name} poems"]) == (legal, poems), name
    assert "chameleon_adapters_loaded 2.0" in httpx.get(f"{keyed.url}/metrics").text
    (line,) = (record for record in caplog.records if getattr(record, "path", "") == "/v1/completions")
    fields = vars(line)
    assert (fields["adapters"], fields["prompt_tokens"], fields["new_tokens"]) == (["legal", "poems"], 9, 12)
    assert 0 <= fields["queued"] <= fields["first_token"] <= fields["seconds"]
    as_key(keyed, "sk-a", "unload_lora_adapter", lora_name="poems")


def test_loading_is_a_right_of_a_key(keyed: Running) -> None:
    code = {"lora_name": "code", "lora_path": "code.safetensors"}
    for key in ("sk-b", "sk-c"):
        for path in ("load_lora_adapter", "unload_lora_adapter"):
            refused = as_key(keyed, key, path, **code)
            assert (refused.status_code, refused.json()["error"]["code"]) == (403, "right_missing")
    assert as_key(keyed, "sk-a", "load_lora_adapter", **code).status_code == 200
    assert as_key(keyed, "sk-b", "completions", model="wiki:code", prompt="a").status_code == 200
    assert as_key(keyed, "sk-a", "unload_lora_adapter", **code).status_code == 200


def test_the_bundles_own_adapters_stay(keyed: Running) -> None:
    def ask() -> Any:
        return as_key(keyed, "sk-b", "completions", model="wiki:legal", prompt=PROMPT, temperature=0).json()

    before = ask()
    refused = as_key(keyed, "sk-a", "unload_lora_adapter", lora_name="legal")
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "adapter_invalid")
    refused = as_key(keyed, "sk-a", "load_lora_adapter", lora_name="legal", lora_path="code.safetensors")
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "adapter_invalid")
    assert {name: ask()[name] for name in ("choices", "system_fingerprint")} == {
        name: before[name] for name in ("choices", "system_fingerprint")
    }


def test_the_fingerprint_tells_which_file_computed(keyed: Running) -> None:
    def ask(file: str) -> list[str]:
        as_key(keyed, "sk-a", "load_lora_adapter", lora_name="mine", lora_path=f"{file}.safetensors")
        completion = as_key(keyed, "sk-b", "completions", model="wiki:mine", prompt="a").json()
        score = as_key(keyed, "sk-b", "score", model="wiki:mine", input="def main").json()
        as_key(keyed, "sk-a", "unload_lora_adapter", lora_name="mine")
        assert score["system_fingerprint"] == completion["system_fingerprint"]
        return str(completion["system_fingerprint"]).split("-")

    base = str(as_key(keyed, "sk-b", "completions", prompt="a").json()["system_fingerprint"]).split("-")
    code, poems = ask("code"), ask("poems")
    assert code[:-1] == poems[:-1] == base
    assert code[-1] != poems[-1]
    assert ask("code") == code


def test_a_request_keeps_the_adapter_that_it_began_with(
    keyed: Running, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever has its name by the time when it computes; the fingerprint tells the file that computed."""
    assert isinstance(keyed, InThread)
    loaded, directory = keyed.served.runtime.adapters, path / "files"
    hold = keyed.served.models.hold

    def ask(path: str) -> Any:
        found = as_key(keyed, "sk-b", path, model="wiki:mine", prompt=PROMPT, input=PROMPT, temperature=0).json()
        return found["system_fingerprint"], [
            {name: choice.get(name) for name in ("text", "token_logprobs")}
            for choice in found.get("choices") or found["data"]
        ]

    def swapped(body: Any) -> Any:
        meant = hold(body)
        loaded.load("mine", directory / "poems.safetensors", replace=True)
        return meant

    for endpoint in ("completions", "score"):
        loaded.load("mine", directory / "code.safetensors")
        expected = ask(endpoint)
        monkeypatch.setattr(keyed.served.models, "hold", swapped)
        assert ask(endpoint) == expected
        monkeypatch.undo()
        assert ask(endpoint) != expected  # which is the other file's by now
        loaded.unload("mine")
    keyed.wait_until_idle()


def test_rows_of_a_request_have_adapters_and_blends_of_their_own(adapters: Running, runtime: Runtime) -> None:
    adapters.post("/v1/load_lora_adapter", lora_name="code", lora_path="code.safetensors")
    rows: list[Any] = [{"legal": 0.7, "code": 0.3}, "code", None, {"legal": -1}]
    texts = [row.text for row in runtime.generate([PROMPT] * 4, adapters=rows, max_new_tokens=12)]

    def ask(**fields: Any) -> Any:
        fields = {"prompt": [PROMPT] * 4, "max_tokens": 12, "temperature": 0, **fields}
        return adapters.post("/v1/completions", **fields).json()

    found = ask(adapters=rows)
    assert [choice["text"] for choice in found["choices"]] == texts
    assert {choice["chameleon"]["mode"] for choice in found["choices"]} == {"static"}
    one = ask(adapters=rows[:1], model="wiki", mode="static")
    assert [choice["text"] for choice in one["choices"]] == texts[:1] * 4
    prints = [found["system_fingerprint"], *(ask(adapters=each)["system_fingerprint"] for each in (rows[:1], ["code"]))]
    assert len({*prints, ask(model="wiki:legal")["system_fingerprint"]}) == 4
    assert prints[2] == ask(model="wiki:code")["system_fingerprint"]
    scored = adapters.post("/v1/score", input=PROMPT, adapters=rows[:1]).json()["data"][0]
    (score,) = runtime.score([PROMPT], adapters=rows[:1])
    assert scored["token_logprobs"] == pytest.approx(score.token_logprobs, abs=1e-4)
    for wrong, code in (
        ({"adapters": rows, "model": "wiki:legal"}, "input_invalid"),
        ({"adapters": rows, "mode": "none"}, "input_invalid"),
        ({"adapters": rows[:3]}, "input_invalid"),
        ({"adapters": []}, "input_invalid"),
        ({"adapters": "code"}, "input_invalid"),
        ({"adapters": [{"nobody": 1}]}, "adapter_invalid"),
        ({"adapters": [{"legal": 1e39}]}, "input_invalid"),
        ({"adapters": [{f"a{i}": 1 for i in range(9)}]}, "input_invalid"),
        ({"adapters": [7]}, "input_invalid"),
    ):
        error = ask(**wrong)["error"]
        assert (error["code"], error["param"]) == (code, "adapters"), wrong
    adapters.post("/v1/unload_lora_adapter", lora_name="code")


@pytest.mark.parametrize("lora_path", ["missing.safetensors", "broken.safetensors", "x" * 5000])
def test_errors_tell_no_path_of_the_server(keyed: Running, path: Path, lora_path: str) -> None:
    refused = as_key(keyed, "sk-a", "load_lora_adapter", lora_name="new", lora_path=lora_path)
    assert refused.status_code == 400
    assert str(path) not in refused.text
    assert len(refused.text) < 800


def test_without_the_option_nothing_is_loaded(server: Running) -> None:
    answer = server.post("/v1/load_lora_adapter", lora_name="code", lora_path="code.safetensors")
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "adapters_fixed")
    assert server.post("/v1/unload_lora_adapter", lora_name="code").status_code == 403


def test_a_service_starts_empty(llama_path: Path, path: Path, tmp_path: Path) -> None:
    """Exported without adapters: the first comes while the service runs."""
    base = load_adapted(str(llama_path / "base"), {}, adaptable=LAYERS, max_rank=4)
    export_bundle(base, tmp_path / "wiki")
    local = chameleon_deploy.load(tmp_path / "wiki", threads=1)
    local.load_adapter("code", path / "files" / "code.safetensors")
    with running(tmp_path / "wiki", rows=4, adapters=[str(path / "files")]) as server:
        assert models(server) == ["wiki", "wiki:none"]
        assert text_of(server, "wiki") == expected(local, None)
        assert server.post("/v1/load_lora_adapter", lora_name="code", lora_path="code.safetensors").status_code == 200
        assert models(server) == ["wiki", "wiki:none", "wiki:code"]
        assert text_of(server, "wiki:code") == expected(local, "code") != expected(local, None)
        assert text_of(server, "wiki") == expected(local, None)


@pytest.fixture(scope="module")
def resolving(path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Two directories, the second of PEFT directories, and two keys, of which the first may load."""
    keys = tmp_path_factory.mktemp("keys") / "keys.json"
    keys.write_text('{"sk-a": {"tenant": "alice", "rights": ["load_adapters"]}, "sk-b": "bob"}')
    directories = [str(path / "files"), str(path)]
    with running(path / "wiki", adapters=directories, adapter_resolver=True, api_keys=keys) as server:
        yield server


def test_the_first_request_that_names_an_adapter_loads_it(resolving: Running, runtime: Runtime) -> None:
    """A file of the first directory, and a PEFT directory of the second; for a key that may load, then for all."""

    def ask(key: str, model: str) -> Any:
        return as_key(resolving, key, "completions", model=model, prompt=PROMPT, max_tokens=12, temperature=0)

    for name in ("code", "poems"):
        assert ask("sk-b", f"wiki:{name}").status_code == 404
    assert ask("sk-a", "wiki:code").json()["choices"][0]["text"] == expected(runtime, "code")
    assert ask("sk-b", "wiki:code").json()["choices"][0]["text"] == expected(runtime, "code")
    blend = {"code": 0.5, "poems": 0.5}
    found = as_key(resolving, "sk-a", "completions", prompt=PROMPT, adapters=[blend], max_tokens=12, temperature=0)
    (row,) = runtime.generate([PROMPT], adapters=[blend], max_new_tokens=12)
    assert found.json()["choices"][0]["text"] == row.text
    for wrong, code in (("nobody", "model_not_found"), ("../code", "model_not_found"), ("broken", "adapter_invalid")):
        assert ask("sk-a", f"wiki:{wrong}").json()["error"]["code"] == code


def test_a_peft_directory_is_listed_and_replaced_in_place(resolving: Running, runtime: Runtime) -> None:
    def load(**fields: Any) -> Any:
        return as_key(resolving, "sk-a", "load_lora_adapter", lora_name="mine", **fields).json()

    def ask() -> str:
        body = as_key(resolving, "sk-b", "completions", model="wiki:mine", prompt=PROMPT, max_tokens=12, temperature=0)
        return str(body.json()["choices"][0]["text"])

    first = load(lora_path="poems")["adapter"]  # which is a PEFT directory
    assert (first["rank"], len(first["targets"]), first["uses"], len(first["digest"])) == (4, 4, 0, 64)
    assert first["size"] == 4 * 4 * sum(runtime.manifest.adaptation.factor_widths.values())
    assert ask() == expected(runtime, "poems")
    assert load(lora_path="code.safetensors")["error"]["code"] == "adapter_invalid"
    assert load(lora_path="broken.safetensors", load_inplace=True)["error"]["code"] == "adapter_invalid"
    assert ask() == expected(runtime, "poems")  # a replacement that fails replaces nothing
    second = load(lora_path="code.safetensors", load_inplace=True)["adapter"]
    assert (second["digest"] != first["digest"], second["uses"]) == (True, 0)
    assert ask() == expected(runtime, "code")
    as_key(resolving, "sk-a", "unload_lora_adapter", lora_name="mine")


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_a_replica_loads_what_a_request_names(ray_cluster: Cluster, path: Path, runtime: Runtime) -> None:
    """Whichever of the two answers; and no request loads or replaces what the other replica would not have."""
    ray_cluster.deploy(path / "wiki", replicas=2, rows=4, adapters=f"{path / 'files'},{path}", adapter_resolver=True)
    server = Running(ray_cluster.url, "wiki", runtime)
    wait_for(lambda: "wiki:legal" in server.http().get("/v1/models").text, 2 * SECONDS)
    wait_for(lambda: len(ray_cluster.replicas()) == 2, 2 * SECONDS)
    names = ["code", "poems"] * 8  # a file, and a file before a PEFT directory of that name
    with ThreadPoolExecutor(len(names)) as pool:
        texts = list(pool.map(lambda name: text_of(server, f"wiki:{name}"), names))
    assert texts == [expected(runtime, name) for name in names]
    blend = {"code": 0.5, "poems": 0.5}
    (row,) = runtime.generate([PROMPT], adapters=[blend], max_new_tokens=12)
    body = {"prompt": PROMPT, "adapters": [blend], "max_tokens": 12, "temperature": 0}
    assert server.post("/v1/completions", **body).json()["choices"][0]["text"] == row.text
    for wrong, code in (("nobody", "model_not_found"), ("broken", "adapter_invalid")):
        assert server.post("/v1/completions", model=f"wiki:{wrong}", prompt=PROMPT).json()["error"]["code"] == code
    for action, fields in (("load", {"lora_path": "code.safetensors", "load_inplace": True}), ("unload", {})):
        answer = server.post(f"/v1/{action}_lora_adapter", lora_name="code", **fields)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "adapters_fixed")
    counted = ray_cluster.metric('chameleon_adapter_requests_total{adapter="code"}')
    assert counted == names.count("code") + 1

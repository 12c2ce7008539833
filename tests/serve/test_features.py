"""docs/features.md: a feature gives the library's tokens wherever the table says yes, and its error code elsewhere."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import chameleon_deploy
from chameleon_deploy import Adapt, Engine, Generate, Generation, Runtime, Sampling, StructuredOutputs
from chameleon_deploy.errors import ChameleonError
from tests.conftest import REPOSITORY
from tests.features import PAGE, PLAIN, PROMPTS, Use, table, uses
from tests.serving import SECONDS, Running, running, wait_for
from tests.shared_data import adapted_bundle, good_bundle
from tests.triton_server import Reader, inputs, serving
from tests.triton_server import Server as TritonServer

LIBRARY = ("generate", "stream", "engine")
INTERFACES = (*LIBRARY, "server", "Ray", "Triton")
# what is to change no token of these short prompts
SAME_TOKENS = ("prompt lookup", "no stop at the end of text", "a salt of the prefix cache",
               "only what is bitwise equal from the prefix cache")  # fmt: skip


class Servers:
    """Servers of each bundle that a feature needs, which start where one is asked for."""

    def __init__(self, request: pytest.FixtureRequest, directory: Path, stack: ExitStack) -> None:
        self._request, self._directory, self._stack = request, directory, stack
        self._on_ray = ""
        self.bundle, self.runtime = cache(self._bundle), cache(self._runtime)
        self.http, self.triton = cache(self._http), cache(self._triton)

    def _bundle(self, name: str) -> Path:
        if name in ("adapters", "activated"):
            return adapted_bundle(name, self._directory)
        if name == "int8":
            return Path(self._request.getfixturevalue("int8_runtime").bundle.path)
        return good_bundle(name)

    def _runtime(self, name: str) -> Runtime:
        return chameleon_deploy.load(self.bundle(name), threads=1)

    def _http(self, name: str) -> Running:
        return self._stack.enter_context(running(self.bundle(name), rows=4))

    def _triton(self, name: str) -> TritonServer:
        work = self._directory / f"triton-{name}"
        work.mkdir()
        return self._stack.enter_context(serving(self.bundle(name), work))

    def ray(self, name: str) -> Running:
        """Return the application, on another bundle than before where it must be."""
        cluster, path = self._request.getfixturevalue("ray_cluster"), self.bundle(name)
        server = Running(cluster.url, path.name, self.runtime(name))
        if self._on_ray != name:
            cluster.deploy(path, rows=4, threads=1)
            wait_for(lambda: path.name in server.http().get("/v1/models").text, 2 * SECONDS)
            self._on_ray = name
        return server


@pytest.fixture(scope="module")
def servers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    with ExitStack() as stack:
        yield Servers(request, tmp_path_factory.mktemp("servers"), stack)


def by_library(call: str, runtime: Runtime, generate: Generate, adapt: Adapt) -> list[list[int]]:
    if call == "generate":
        return [generation.token_ids for generation in runtime.generate(PROMPTS, generate, adapt)]
    if call == "stream":
        rows: list[list[int]] = [[] for _ in range(len(PROMPTS) * generate.n)]
        for token in runtime.stream(PROMPTS, generate, adapt):
            rows[token.row] += [token.token_id] * (token.token_id >= 0)
        return rows
    with Engine(runtime, rows=4, prefill_tokens=8) as engine:
        return [generation.token_ids for generation in engine.submit(PROMPTS, generate, adapt).result(60)]


def body_of(use: Use, name: str) -> dict[str, Any]:
    """Return the body of a request that means the same."""
    own = use.body if use.body is not None else {**use.adapt, **use.generate}
    bias = {str(token_id): value for token_id, value in use.sampling.get("logit_bias", {}).items()}
    sampling = {**PLAIN, **use.sampling, **({"logit_bias": bias} if bias else {})}
    if "structured_outputs" in sampling:
        sampling["structured_outputs"] = asdict(sampling["structured_outputs"])
    return {"model": name, "prompt": PROMPTS, "max_tokens": 8, "return_token_ids": True, **sampling, **own}


def by_http(server: Running, use: Use, expected: list[Generation]) -> str:
    """Return the error code of a request; "" where it gives what the library gives."""
    answer = server.post("/v1/completions", **body_of(use, server.name)).json()
    if "error" in answer:
        return str(answer["error"]["code"])
    choices = answer["choices"]
    assert [choice["token_ids"] for choice in choices] == [generation.token_ids for generation in expected]
    assert [choice["finish_reason"] for choice in choices] == [generation.finish_reason for generation in expected]
    for choice, generation in zip(choices, expected, strict=True):
        if generation.token_logprobs is not None:
            assert choice["logprobs"]["token_logprobs"] == pytest.approx(generation.token_logprobs, abs=1e-3)
    return ""


def by_triton(server: TritonServer, runtime: Runtime, use: Use) -> str:
    """Return the error code of requests of one prompt each; "" where they give what the library gives."""
    reader, client = Reader(), server.client()
    client.start_stream(reader)
    try:
        for i, text in enumerate(runtime.tokenizer.decode_batch(PROMPTS, skip_special_tokens=False)):
            own = use._replace(generate=of_prompt(use.generate, i), adapt=of_prompt(use.adapt, i))
            tensors = inputs(text_input=text, sampling_parameters=json.dumps(parameters(own), default=as_json))
            client.async_stream_infer(server.model, tensors, request_id=str(i))
            ended = reader.ended.get(timeout=60)
            if ended != str(i):
                return str(ended.message()).rpartition("[")[2].rstrip("]")
            expected = runtime.generate([text], *options(own, 1))
            for _ in expected[1:]:
                assert reader.ended.get(timeout=60) == str(i)
            assert [reader.tokens[str(i)][k] for k in range(len(expected))] == [one.token_ids for one in expected]
            assert reader.reasons[str(i)] == [one.finish_reason for one in expected]
            if (logprobs := expected[0].token_logprobs) is not None:
                assert reader.logprobs[str(i)] == pytest.approx(logprobs, abs=1e-3)
    finally:
        client.stop_stream()
    return ""


def as_json(value: Any) -> Any:
    return asdict(value) if isinstance(value, StructuredOutputs) else repr(value)


def of_prompt(fields: dict[str, Any], i: int) -> dict[str, Any]:
    """Return the fields of one prompt."""
    own: set[str] = {name for name in ("tenants", "adapters", "conditioning") if name in fields}
    own |= {"adapt_text"} if isinstance(fields.get("adapt_text"), list) else set()
    limit = fields.get("max_new_tokens")
    return {
        **fields,
        **{name: fields[name][i : i + 1] for name in own},
        **({"max_new_tokens": limit[i]} if isinstance(limit, list) else {}),
    }


def parameters(use: Use) -> dict[str, Any]:
    """Return the sampling_parameters of a request that means the same."""
    mode = {"mode": "centroid"} if use.bundle == "chameleon_masked" else {}
    found = {"max_new_tokens": 8, **mode, **use.generate, **use.adapt, **PLAIN, **use.sampling}
    if use.bundle in ("adapters", "activated"):
        (choice,) = found.pop("adapters")
        found["lora_name" if isinstance(choice, str) else "adapters"] = choice
    if "structured_outputs" in found:
        found["structured_outputs"] = asdict(found["structured_outputs"])
    return {"max_tokens": found.pop("max_new_tokens"), **found}


def options(use: Use, prompts: int) -> tuple[Generate, Adapt]:
    """Return the library's options of a use."""
    sampling = [Sampling(**{**PLAIN, **use.sampling})] * prompts
    mode = "centroid" if use.bundle == "chameleon_masked" else None
    return (
        Generate(**{"max_new_tokens": 8, "sampling": sampling, **use.generate}),
        Adapt(**{"mode": mode, **use.adapt}),
    )


MARKS = {"Ray": [pytest.mark.ray, pytest.mark.timeout(900)], "Triton": [pytest.mark.triton, pytest.mark.timeout(300)]}
CELLS = [
    pytest.param(feature, interface, marks=MARKS.get(interface, ())) for interface in INTERFACES for feature in table()
]


@pytest.mark.parametrize(("feature", "interface"), CELLS)
def test_a_cell(feature: str, interface: str, servers: Servers) -> None:
    cell = table()[feature][interface]
    code = match[1] if (match := re.match(r"`?(\w+_\w+)", cell)) else ""
    assert code or cell.startswith("yes"), cell
    for use in uses()[feature]:
        runtime = servers.runtime(use.bundle)
        generate, adapt = options(use, len(PROMPTS))
        if interface in LIBRARY and code:
            with pytest.raises(ChameleonError) as refused:
                by_library(interface, runtime, generate, adapt)
            assert refused.value.code == code
            continue
        if interface == "Triton":
            assert by_triton(servers.triton(use.bundle), runtime, use) == code
            continue
        expected = [] if code else runtime.generate(PROMPTS, generate, adapt)
        if interface in LIBRARY:
            found = by_library(interface, runtime, generate, adapt)
            assert found == [generation.token_ids for generation in expected]
        else:
            server = servers.ray(use.bundle) if interface == "Ray" else servers.http(use.bundle)
            assert by_http(server, use, expected) == code


def test_the_plain_request_differs_from_each_feature() -> None:
    """Else a feature that is ignored everywhere would pass: each use changes what is generated or refused."""
    runtime = chameleon_deploy.load(good_bundle("chameleon_masked"), threads=1, mode="centroid")
    sampling = Sampling(**PLAIN)
    plain = runtime.generate(PROMPTS, Generate(8, [sampling] * 3))
    for feature, (use, *_) in uses().items():
        if use.bundle != "chameleon_masked" or feature in SAME_TOKENS:
            continue
        assert runtime.generate(PROMPTS, *options(use, len(PROMPTS))) != plain, feature


WHERE = {"Python": "chameleon_deploy/runtime/**/*.py", "server": "chameleon_deploy/serve/*.py",
         "Ray": "chameleon_deploy/serve/*.py", "C++": "runtime/include/chameleon/*.h",
         "C": "runtime/include/chameleon.h"}  # fmt: skip


def names_of_nothing(page: str) -> list[str]:
    """Return what cells of the last table name that the code of their column has not."""
    lines = [line for line in page.partition("## Adapters")[2].splitlines() if line.startswith("|")]
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    code = {name: "".join(file.read_text() for file in REPOSITORY.glob(files)) for name, files in WHERE.items()}
    missing = []
    for row in rows:
        for name, cell in zip(header[1:], row[1:], strict=True):
            assert cell == "no" or "`" in cell, cell
            words = re.findall(r"[/\w]+", " ".join(re.findall("`(.+?)`", cell)))
            missing += [word for word in words if not re.search(rf"(?<!\w){word}\b", code[name])]
    return missing


@pytest.mark.parametrize(
    ("written", "planted"),
    [
        ("", ""),
        ("`chameleon_tenant`", "`chameleon_tenants`"),
        ("`load_inplace`", "`inplace`"),
        ("`max_bytes`", "`most_bytes_`"),
    ],
)
def test_what_manages_adapters_exists(written: str, planted: str) -> None:
    assert written in PAGE.read_text()
    assert names_of_nothing(PAGE.read_text().replace(written, planted, 1)) == ([planted.strip("`")] if planted else [])

"""A real tritonserver, the one of the package nvidia-pytriton, with a repository that export wrote.

`make scale` runs these. TRITON is an environment with nvidia-pytriton and chameleon-deploy[cpu], apart because the
Python backend of tritonserver 2.51 aborts at the first text where numpy is 2. The tests want tritonclient[grpc].
"""

from __future__ import annotations

import os
import queue
import shutil
import subprocess
import sys
import sysconfig
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import chameleon_deploy
from chameleon_deploy.triton import write_repository
from tests.ports import free_port

REPOSITORY = Path(__file__).parents[2]
pytestmark = [pytest.mark.triton, pytest.mark.timeout(300)]
REQUESTS = 1000
TOKENS = 12
_KINDS = {"text_input": "BYTES", "mode": "BYTES", "max_tokens": "INT32", "temperature": "FP32"}


@dataclass
class Server:
    """A tritonserver with one model."""

    address: str
    model: str

    def client(self) -> Any:
        import tritonclient.grpc

        return tritonclient.grpc.InferenceServerClient(self.address)


@pytest.fixture(scope="module")
def server(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    environment, work = Path(os.environ["TRITON"]), tmp_path_factory.mktemp("triton")
    (packages,) = environment.glob("lib/python3*/site-packages")
    home = packages / "pytriton" / "tritonserver"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    shutil.copytree(home / "backends", work / "backends")
    shutil.copy(home / "python_backend_stubs" / version / "triton_python_backend_stub", work / "backends" / "python")
    write_repository(bundle, work / "models")
    port = free_port()
    command: list[str | Path] = [
        home / "bin" / "tritonserver", f"--model-repository={work / 'models'}",
        f"--backend-directory={work / 'backends'}", f"--grpc-port={port}",
        "--allow-http=false", "--allow-metrics=false",
    ]  # fmt: skip
    env = {
        **os.environ,
        "CHAMELEON_DEPLOY_CACHE": str(work / "cache"),
        # The stub was moved away from its libraries, and links to libpython.
        "LD_LIBRARY_PATH": f"{packages / 'nvidia_pytriton.libs'}:{sysconfig.get_config_var('LIBDIR')}",
        "PATH": f"{environment / 'bin'}:{os.environ['PATH']}",  # the stub takes the environment of this python3
    }
    with subprocess.Popen(command, env=env, cwd=REPOSITORY) as process:
        running = Server(f"127.0.0.1:{port}", bundle.name)
        try:
            end = time.monotonic() + 60
            while not _is_ready(running):
                assert process.poll() is None and time.monotonic() < end
                time.sleep(0.2)
            yield running
        finally:
            process.terminate()
            process.wait(60)


def _is_ready(server: Server) -> bool:
    from tritonclient.utils import InferenceServerException

    try:
        return bool(server.client().is_model_ready(server.model))
    except InferenceServerException:
        return False


def _inputs(**values: Any) -> list[Any]:
    import tritonclient.grpc

    tensors = []
    for name, value in values.items():
        kind = _KINDS[name]
        array = np.array([value.encode() if kind == "BYTES" else value])
        array = array.astype({"BYTES": np.object_, "INT32": np.int32, "FP32": np.float32}[kind])
        tensors.append(tritonclient.grpc.InferInput(name, array.shape, kind))
        tensors[-1].set_data_from_numpy(array)
    return tensors


class Reader:
    """What a stream of responses brings: per request id the tokens and the text, or the error."""

    def __init__(self) -> None:
        self.tokens: defaultdict[str, list[int]] = defaultdict(list)
        self.texts: defaultdict[str, str] = defaultdict(str)
        self.ended = queue.SimpleQueue[Any]()  # a request's id, or an error

    def __call__(self, result: Any, error: Any) -> None:
        if error is not None:
            self.ended.put(error)
            return
        name = result.get_response().id
        if result.as_numpy("token_id") is None:  # Triton's mark of the end
            return
        self.tokens[name].append(int(result.as_numpy("token_id")[0]))
        self.texts[name] += result.as_numpy("text_output")[0].decode()
        if result.as_numpy("finish_reason")[0]:
            self.ended.put(name)


def test_a_thousand_streams_equal_the_runtime(server: Server, bundle: Path) -> None:
    runtime, reader, client = chameleon_deploy.load(bundle, mode="centroid", threads=1), Reader(), server.client()
    prompts = [f"The river {i % 100} of" for i in range(REQUESTS)]
    expected = {prompt: runtime.generate([prompt], max_new_tokens=TOKENS)[0] for prompt in set(prompts)}
    client.start_stream(reader)
    for i, prompt in enumerate(prompts):
        inputs = _inputs(text_input=prompt, max_tokens=TOKENS, temperature=0)
        client.async_stream_infer(server.model, inputs, request_id=str(i))
    assert sorted(reader.ended.get(timeout=120) for _ in prompts) == sorted(map(str, range(REQUESTS)))
    client.stop_stream()
    for i, prompt in enumerate(prompts):
        assert reader.tokens[str(i)] == expected[prompt].token_ids
        assert reader.texts[str(i)] == expected[prompt].text


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"mode": "nonsense"}, "[mode_unavailable]"),
        ({"max_tokens": 0}, "[input_invalid]"),
        ({"temperature": -1}, "[input_invalid]"),
        ({"text_input": "river " * 1000}, "[text_too_long]"),
    ],
)
def test_a_bad_request_harms_nobody(server: Server, fault: dict[str, Any], message: str) -> None:
    reader, client = Reader(), server.client()
    client.start_stream(reader)
    client.async_stream_infer(server.model, _inputs(text_input="The river", max_tokens=TOKENS), request_id="good")
    client.async_stream_infer(server.model, _inputs(**{"text_input": "The river", **fault}), request_id="bad")
    ended = [reader.ended.get(timeout=60) for _ in range(2)]
    client.stop_stream()
    (error,) = (one for one in ended if one != "good")
    assert message in error.message() and reader.tokens["good"]


def test_cancelled_requests_make_room(server: Server) -> None:
    """Enough rows to fill the queue for much longer than the next request may take."""
    client, reader = server.client(), Reader()
    client.start_stream(reader)
    for i in range(1000):
        client.async_stream_infer(server.model, _inputs(text_input=f"Cancel {i}", max_tokens=120), request_id=str(i))
    while not reader.tokens:
        time.sleep(0.01)
    client.stop_stream(cancel_requests=True)
    assert len(reader.texts) < 1000
    after, reader = server.client(), Reader()
    after.start_stream(reader)
    after.async_stream_infer(server.model, _inputs(text_input="The river", max_tokens=2), request_id="next")
    assert reader.ended.get(timeout=10) == "next"
    after.stop_stream()

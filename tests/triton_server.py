"""A real tritonserver, the one of the package nvidia-pytriton, with a repository that `triton` wrote.

TRITON is an environment with nvidia-pytriton and chameleon-deploy[cpu], apart because the Python backend of
tritonserver 2.51 aborts at the first text where numpy is 2. Clients are of tritonclient[grpc].
"""

from __future__ import annotations

import contextlib
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

from chameleon_deploy.triton import write_repository
from tests.ports import free_port

REPOSITORY = Path(__file__).parents[1]
_KINDS = {"max_tokens": "INT32", "temperature": "FP32"}  # the rest are texts


@dataclass
class Server:
    """A tritonserver with one model."""

    address: str
    model: str

    def client(self) -> Any:
        import tritonclient.grpc

        return tritonclient.grpc.InferenceServerClient(self.address)

    def is_ready(self) -> bool:
        from tritonclient.utils import InferenceServerException

        try:
            return bool(self.client().is_model_ready(self.model))
        except InferenceServerException:
            return False


@contextlib.contextmanager
def serving(bundle: Path, work: Path) -> Iterator[Server]:
    environment = Path(os.environ["TRITON"])
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
        server = Server(f"127.0.0.1:{port}", bundle.name)
        try:
            end = time.monotonic() + 60
            while not server.is_ready():
                assert process.poll() is None and time.monotonic() < end
                time.sleep(0.2)
            yield server
        finally:
            process.terminate()
            process.wait(60)


def inputs(**values: Any) -> list[Any]:
    """Return the tensors of a request."""
    import tritonclient.grpc

    tensors = []
    for name, value in values.items():
        kind = _KINDS.get(name, "BYTES")
        array = np.array([value.encode() if kind == "BYTES" else value])
        array = array.astype({"BYTES": np.object_, "INT32": np.int32, "FP32": np.float32}[kind])
        tensors.append(tritonclient.grpc.InferInput(name, array.shape, kind))
        tensors[-1].set_data_from_numpy(array)
    return tensors


class Reader:
    """What a stream of responses brings: per request id the tokens and texts of its rows, or the error."""

    def __init__(self) -> None:
        self.tokens: defaultdict[str, defaultdict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
        self.texts: defaultdict[str, str] = defaultdict(str)
        self.logprobs: defaultdict[str, list[float]] = defaultdict(list)
        self.reasons: defaultdict[str, list[str]] = defaultdict(list)
        self.ended = queue.SimpleQueue[Any]()  # a request's id at the end of a row, or an error

    def __call__(self, result: Any, error: Any) -> None:
        if error is not None:
            self.ended.put(error)
            return
        name = result.get_response().id
        if result.as_numpy("token_id") is None:  # Triton's mark of the end
            return
        token_id = int(result.as_numpy("token_id")[0])
        self.tokens[name][int(result.as_numpy("index")[0])] += [token_id] * (token_id >= 0)
        self.logprobs[name].append(float(result.as_numpy("logprob")[0]))
        self.texts[name] += result.as_numpy("text_output")[0].decode()
        if reason := result.as_numpy("finish_reason")[0]:
            self.reasons[name].append(reason.decode())
            self.ended.put(name)

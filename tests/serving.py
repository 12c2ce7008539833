"""Real servers: in a thread of the test, or as the process that users start."""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import httpx

from chameleon_deploy import Runtime
from chameleon_deploy.serve.server import Server
from chameleon_deploy.serve.service import ServedModel, Service
from chameleon_deploy.serve.settings import Settings

if TYPE_CHECKING:
    import openai

SECONDS = 60
COMMAND = [sys.executable, "-m", "chameleon_deploy.serve"]


@dataclass
class Running:
    """A server that answers.

    runtime  gives the results that the server must give
    """

    url: str
    name: str
    runtime: Runtime

    def openai(self, key: str = "none") -> openai.OpenAI:
        import openai  # seconds, on an emulated processor

        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=SECONDS)

    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=SECONDS)

    def post(self, path: str, **body: Any) -> httpx.Response:
        with self.http() as client:
            return client.post(path, json=body)

    def connect(self) -> socket.socket:
        host, _, port = self.url.removeprefix("http://").partition(":")
        return socket.create_connection((host, int(port)))

    def rows(self, state: Literal["running", "waiting"]) -> float:
        """How many rows are running or waiting, as /metrics tells it."""
        found = re.search(rf"^chameleon_num_requests_{state} (.*)", httpx.get(f"{self.url}/metrics").text, re.MULTILINE)
        assert found
        return float(found[1])

    def wait_until_idle(self) -> None:
        """Until the engine has no row any more."""
        wait_for(lambda: self.rows("running") + self.rows("waiting") == 0)


@dataclass
class InThread(Running):
    """A server in a thread of this process."""

    server: Server
    service: Service
    thread: threading.Thread

    @property
    def served(self) -> ServedModel:
        return self.service.served


@contextlib.contextmanager
def running(bundle: Path, **settings: Any) -> Iterator[InThread]:
    service = Service(Settings(bundle, threads=1, **settings))
    server = Server(service, "127.0.0.1", 0)
    thread = threading.Thread(target=server.serve_until_ended)
    thread.start()
    url = f"http://127.0.0.1:{server.port}"
    try:
        wait_for(lambda: server.started or not thread.is_alive())
        wait_for(lambda: httpx.get(f"{url}/health").status_code == 200)
        served = service.served
        yield InThread(url, served.models.name, served.runtime, server, service, thread)
    finally:
        server.stop()
        thread.join(SECONDS)
        assert not thread.is_alive()


@contextlib.contextmanager
def process(bundle: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The server's command, and its URL."""
    with listening([*COMMAND, str(bundle), "--port", "0", "--threads", "1", *options]) as found:
        yield found


@contextlib.contextmanager
def listening(command: Sequence[str]) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A command that says on which URL it listens, once it is healthy."""
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as started:
        assert started.stderr is not None
        try:
            line = next(line for line in started.stderr if "listening on" in line)
            address = re.search(r"https?://[\d.]+:\d+", line)
            assert address
            url = address[0]
            wait_for(lambda: httpx.get(f"{url}/health", verify=False).status_code == 200)  # noqa: S501
            yield started, url
        finally:
            started.send_signal(signal.SIGKILL)


def wait_for(condition: Any, seconds: float = SECONDS) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)

"""Real servers: in a thread of the test, or as the process that users start."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai

from chameleon_deploy import Runtime
from chameleon_deploy.serve.server import Server
from chameleon_deploy.serve.service import Served, Service, Settings

SECONDS = 60


@dataclass
class Running:
    """A server in a thread of this process."""

    server: Server
    service: Service
    thread: threading.Thread

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.port}"

    @property
    def served(self) -> Served:
        return self.service.served

    @property
    def runtime(self) -> Runtime:
        return self.served.runtime

    @property
    def name(self) -> str:
        return self.served.models.name

    def openai(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=SECONDS)

    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=SECONDS)

    def post(self, path: str, **body: Any) -> httpx.Response:
        with self.http() as client:
            return client.post(path, json=body)

    def wait_until_idle(self) -> None:
        """Until the engine has no row any more."""
        wait_for(lambda: self.served.engine.stats().running + self.served.engine.stats().waiting == 0)


@contextlib.contextmanager
def running(bundle: Path, **settings: Any) -> Iterator[Running]:
    service = Service(Settings(bundle, threads=1, **settings))
    server = Server(service, "127.0.0.1", 0)
    thread = threading.Thread(target=server.serve_until_ended)
    thread.start()
    try:
        wait_for(lambda: server.started or not thread.is_alive())
        found = Running(server, service, thread)
        wait_for(lambda: httpx.get(f"{found.url}/health").status_code == 200)
        yield found
    finally:
        server.stop()
        thread.join(SECONDS)
        assert not thread.is_alive()


@contextlib.contextmanager
def process(bundle: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The command, and its URL."""
    command = [sys.executable, "-m", "chameleon_deploy.serve", str(bundle), "--port", "0", "--threads", "1", *options]
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

"""A Ray cluster of real nodes on this machine, and the application on it."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.ports import free_port

SECONDS = 120
_BIN = Path(sys.executable).parent


def wait_for(condition: Callable[[], object], seconds: float = SECONDS) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.1)


@dataclass
class Cluster:
    """Nodes by the process of each one's raylet, and the address of the application."""

    gcs_port: int
    http_port: int
    env: dict[str, str]
    nodes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http_port}"

    def add_node(self, cpus: int) -> subprocess.Popen[bytes]:
        where = ["--address", f"127.0.0.1:{self.gcs_port}"]
        if not self.nodes:
            where = ["--head", "--port", str(self.gcs_port), "--include-dashboard=false"]
        options = ["--node-ip-address=127.0.0.1", f"--num-cpus={cpus}", "--block", "--object-store-memory=80000000"]
        node = subprocess.Popen([_BIN / "ray", "start", *where, *options], env=self.env, start_new_session=True)
        self.nodes.append(node)
        return node

    def remove_node(self, node: subprocess.Popen[bytes]) -> None:
        """End a node and everything on it without a word to the others, as a power failure does."""
        for process in [*psutil.Process(node.pid).children(recursive=True), psutil.Process(node.pid)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        node.wait()
        self.nodes.remove(node)

    def run(self, application: str, *arguments: str) -> None:
        """`serve run`: deploy an application, or what has changed of it, and wait until it answers."""
        options = ["--address", f"127.0.0.1:{self.gcs_port}", "--non-blocking"]
        command: list[str | Path] = [_BIN / "serve", "run", *options, application, *arguments]
        subprocess.run(command, env=self.env, check=True, timeout=SECONDS)

    def deploy(self, bundle: Path, **options: Any) -> None:
        """Deploy the application on a bundle, with options of its own."""
        given = [f"{name}={value}" for name, value in {"bundle": bundle, **options}.items()]
        self.run("chameleon_deploy.serve.ray:app", *given)

    def is_healthy(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health").status_code == 200
        except httpx.HTTPError:
            return False

    def replicas(self) -> list[psutil.Process]:
        return [process for process in psutil.process_iter() if _title(process).startswith("ray::ServeReplica") and
                ":Replica" in _title(process)]  # fmt: skip

    def metric(self, line: str) -> float:
        """The value of a sample by its name and labels."""
        text = httpx.get(f"{self.url}/metrics", timeout=SECONDS).text
        return sum(float(found.rpartition(" ")[2]) for found in text.splitlines() if found.startswith(line))


@contextlib.contextmanager
def cluster(tmp_path: Path, cpus: tuple[int, ...]) -> Iterator[Cluster]:
    """Start nodes of so many processors each, and Serve on them."""
    env = {
        **os.environ,
        "CHAMELEON_DEPLOY_CACHE": str(tmp_path / "cache"),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEDUP_LOGS": "0",
        "RAY_worker_niceness": "0",  # else a replica that starts beside other tests takes too long
        "OMP_NUM_THREADS": "1",
    }
    found = Cluster(free_port(), free_port(), env)
    try:
        for count in cpus:
            found.add_node(count)
            wait_for(lambda: _listens(found.gcs_port))
        address = f"127.0.0.1:{found.gcs_port}"
        wait_for(lambda: _starts(found, address))
        yield found
    finally:
        for node in found.nodes[::-1]:
            found.remove_node(node)


def _starts(cluster: Cluster, address: str) -> bool:
    options = ["--address", address, "--http-host", "127.0.0.1", "--http-port", str(cluster.http_port)]
    options += ["--proxy-location", "HeadOnly"]  # all nodes have one address here
    return subprocess.run([_BIN / "serve", "start", *options], env=cluster.env, check=False).returncode == 0


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return ""

"""The command as users run it: signals, logs, TLS, bad input."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from chameleon_deploy.serve.server import listen
from tests.serving import COMMAND, process

LONG = {"prompt": "A secret prompt", "max_tokens": 120, "ignore_eos": True, "mode": "none"}


def end(*arguments: object) -> subprocess.CompletedProcess[str]:
    """A command that ends by itself."""
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, check=False)


def test_no_part_of_an_answer_waits_for_an_acknowledgement() -> None:
    with listen("127.0.0.1", 0) as listening, socket.create_connection(listening.getsockname()):
        connection, _ = listening.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_sigterm_drains_and_the_log_holds_no_prompt(bundle: Path) -> None:
    with (
        process(bundle, "--log-json") as (server, url),
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        found: list[httpx.Response] = []
        asking = threading.Thread(target=lambda: found.append(client.post("/v1/completions", json=LONG)))
        asking.start()
        time.sleep(0.05)
        server.send_signal(signal.SIGTERM)
        asking.join()
        assert server.wait(60) == 0
        assert server.stderr is not None
        lines = server.stderr.read().splitlines()
    assert found[0].status_code in (200, 503)  # 503 where the signal was first
    logged = [json.loads(line) for line in lines]
    ours = [entry for entry in logged if entry.get("path") == "/v1/completions"]
    assert ours[0]["status"] == found[0].status_code
    assert ours[0]["request_id"] == found[0].headers["x-request-id"]
    assert not any("secret" in line for line in lines)


def test_prompts_are_logged_where_that_is_asked_for(bundle: Path) -> None:
    with process(bundle, "--log-json", "--log-prompts") as (server, url):
        httpx.post(f"{url}/v1/completions", json={**LONG, "max_tokens": 1}, timeout=60)
        server.send_signal(signal.SIGINT)
        assert server.wait(60) == 0
        assert server.stderr is not None
        assert "A secret prompt" in server.stderr.read()


def test_a_bad_bundle_ends_the_command(tmp_path: Path) -> None:
    result = end(tmp_path, "--port", "0")
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].endswith("[bundle_not_found]")


def test_a_port_in_use_ends_the_command(bundle: Path) -> None:
    with process(bundle) as (_, url):
        result = end(bundle, "--port", url.rpartition(":")[2])
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("error: ")


def test_a_missing_certificate_ends_the_command(bundle: Path, tmp_path: Path) -> None:
    result = end(bundle, "--ssl-certfile", tmp_path / "none.pem")
    assert result.returncode == 2
    assert "none.pem" in result.stderr


def test_tls(bundle: Path, tmp_path: Path) -> None:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-days", "1"]
    subprocess.run([*command, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    options = ["--ssl-certfile", str(certificate), "--ssl-keyfile", str(key)]
    with process(bundle, *options) as (_, url):
        assert url.startswith("https://")
        answer = httpx.post(f"{url}/tokenize", json={"prompt": "a"}, verify=False)  # noqa: S501
        assert answer.status_code == 200


@pytest.mark.parametrize("module", ["starlette", "uvicorn", "prometheus_client"])
def test_a_missing_package_is_named(bundle: Path, module: str) -> None:
    code = (
        f"import sys; sys.modules[{module!r}] = None; sys.argv = ['serve', {str(bundle)!r}]\n"
        "import runpy; runpy.run_module('chameleon_deploy.serve', run_name='__main__')"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "pip install" in result.stderr and "[dependency_missing]" in result.stderr

"""`python -m chameleon_deploy.serve`: serve a bundle over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from chameleon_deploy.contract.bundle import Mode
from chameleon_deploy.errors import DependencyError
from chameleon_deploy.terminal import console


def main(
    bundle: console.BundleArgument,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    mode: Annotated[Mode | None, typer.Option(help="Adaptation mode where a request names none.")] = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows that are generated at a time.")] = 8,
    max_waiting: Annotated[int, typer.Option(min=0, help="Rows that may wait; more are refused with 429.")] = 256,
    prefill_tokens: Annotated[int, typer.Option(min=1, help="Prompt tokens read between two steps.")] = 256,
    capacity: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a row, prompt and answer; default: the model's positions.")
    ] = None,
    max_factor_sets: Annotated[
        int | None, typer.Option(min=1, help="Factor sets of the running rows; default: as many as --rows.")
    ] = None,
    adapters: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="Let requests load adapter files of this directory."),
    ] = None,
    max_adapter_bytes: Annotated[int, typer.Option(min=1, help="Of loaded adapters that stay in memory.")] = 2**30,
    api_keys: Annotated[
        Path | None, typer.Option(help='JSON file, {"key": "tenant"} or {"key": {"tenant": ..., "rights": [...]}}.')
    ] = None,
    cohort_window_ms: Annotated[float, typer.Option(min=0, help="Join cohorts of requests this close.")] = 0,
    max_body_bytes: Annotated[int, typer.Option(min=1, help="Larger bodies are refused with 413.")] = 4 * 2**20,
    max_requests: Annotated[int, typer.Option(min=1, help="Requests at a time; more are refused with 429.")] = 512,
    max_connections: Annotated[int, typer.Option(min=1, help="Beyond, the longest silent are closed.")] = 1000,
    max_unfinished_bytes: Annotated[
        int, typer.Option(min=1, help="Of bodies over 64 KiB that are arriving; more are refused with 429.")
    ] = 64 * 2**20,
    max_step_seconds: Annotated[
        float, typer.Option(min=0.001, help="Of an engine's step; a longer one is logged and makes /health 503.")
    ] = 30,
    drain_seconds: Annotated[float, typer.Option(min=0, help="For requests to end after SIGTERM.")] = 30,
    provider: Annotated[str, typer.Option(help="cpu, cuda, tensorrt or auto.")] = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="Of ONNX Runtime.")] = None,
    share_weights: Annotated[bool, typer.Option(help="Map weights that other processes share.")] = False,
    self_check: Annotated[
        bool, typer.Option("--self-check", help="Refuse to serve unless this machine computes what export recorded.")
    ] = False,
    trusted_key: Annotated[
        list[Path] | None, typer.Option(help="Refuse a bundle that this Ed25519 public key (PEM) did not sign.")
    ] = None,
    log_json: Annotated[bool, typer.Option("--log-json", help="One JSON object per log line.")] = False,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Log the bodies of requests.")] = False,
    ssl_certfile: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="TLS certificate, PEM.")
    ] = None,
    ssl_keyfile: Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help="TLS private key, PEM.")] = None,
) -> None:
    """Serve a bundle with an OpenAI-style API, metrics and a playground, until SIGTERM or Ctrl-C."""
    try:
        from chameleon_deploy.serve import logs
        from chameleon_deploy.serve.server import Server
        from chameleon_deploy.serve.service import Service, Settings
    except ModuleNotFoundError as error:
        raise DependencyError(f"serve needs {error.name}: pip install 'chameleon-deploy[cpu,serve]'") from error
    logs.configure(log_json)
    service = Service(Settings(
        console.bundle_path(bundle), mode, provider, threads, share_weights, rows, max_waiting, prefill_tokens,
        cohort_window_ms, api_keys, max_body_bytes, max_requests, drain_seconds, log_prompts, trusted_key,
        max_factor_sets, adapters, max_adapter_bytes, capacity, self_check, max_connections, max_unfinished_bytes,
        max_step_seconds,
    ))  # fmt: skip
    Server(service, host, port, ssl_certfile=ssl_certfile, ssl_keyfile=ssl_keyfile).serve_until_ended()


if __name__ == "__main__":
    console.run(main)

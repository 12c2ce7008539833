"""`python -m chameleon_deploy.serve`: serve a bundle over HTTP."""

from __future__ import annotations

from inspect import Signature, signature
from pathlib import Path
from typing import Annotated, Any

import typer

from chameleon_deploy.errors import DependencyError
from chameleon_deploy.serve.settings import Settings, parameters
from chameleon_deploy.terminal import console


def main(
    bundle: console.BundleArgument,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    log_json: Annotated[bool, typer.Option("--log-json", help="One JSON object per log line.")] = False,
    ssl_certfile: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="TLS certificate, PEM.")
    ] = None,
    ssl_keyfile: Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help="TLS private key, PEM.")] = None,
    **settings: Any,
) -> None:
    """Serve a bundle with an OpenAI-style API, metrics and a playground, until SIGTERM or Ctrl-C."""
    try:
        from chameleon_deploy.serve import logs
        from chameleon_deploy.serve.server import Server
        from chameleon_deploy.serve.service import Service
    except ModuleNotFoundError as error:
        raise DependencyError(f"serve needs {error.name}: pip install 'chameleon-deploy[cpu,serve]'") from error
    logs.configure(log_json)
    service = Service(Settings(console.bundle_path(bundle), **settings))
    Server(service, host, port, ssl_certfile=ssl_certfile, ssl_keyfile=ssl_keyfile).serve_until_ended()


_own = [parameter for parameter in signature(main, eval_str=True).parameters.values() if parameter.name != "settings"]
main.__signature__ = Signature([*_own, *parameters(typer.Option)])  # type: ignore[attr-defined]


if __name__ == "__main__":
    console.run(main)

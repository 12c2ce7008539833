"""`python -m chameleon_deploy.verify`: prove a bundle equal to its PyTorch reference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from chameleon_deploy.terminal import console
from chameleon_deploy.terminal.adapter_options import AdapterDirectories, named_directories
from chameleon_deploy.verify.report import check_sheet, require_passed
from chameleon_deploy.verify.run import verify_bundle


def main(
    bundle: console.BundleArgument,
    reference: Annotated[
        Path, typer.Option(help="The checkpoint, or with --adapter the base model, that it was exported from.")
    ],
    base: Annotated[
        str | None, typer.Option(help="Base model, if the checkpoint's reference to it no longer holds.")
    ] = None,
    adapter: AdapterDirectories = None,
    text: Annotated[list[Path] | None, typer.Option(help="Text to verify on; default: Python's documentation.")] = None,
    provider: Annotated[str, typer.Option(help="cpu, cuda, tensorrt or auto.")] = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="Of ONNX Runtime.")] = None,
    max_kl: Annotated[
        float | None, typer.Option(min=0, help="Accept a mean KL up to this value and record it; default: the gate.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the record as JSON.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the record as JSON to this file.")] = None,
) -> None:
    """Check every numeric gate against the PyTorch reference; exit 1 if one is missed."""
    from chameleon_deploy.reference.source import load_source

    console.check_output(out)
    checkpoint = load_source(reference, base, named_directories(adapter))
    with console.progress() as report:
        checks, record = verify_bundle(
            console.bundle_path(bundle), checkpoint, text, threads, report, provider, keep_trunk=False, max_kl=max_kl
        )
    console.tell_provider(provider, record["provider"])
    if out:
        console.write_json(record, out)
    if as_json:
        print(json.dumps(record))
    else:
        console.show(check_sheet(checks))
    require_passed(checks)


if __name__ == "__main__":
    console.run(main)

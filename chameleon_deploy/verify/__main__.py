"""`python -m chameleon_deploy.verify`: prove a bundle equal to its PyTorch reference, or to its record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from chameleon_deploy.terminal import console
from chameleon_deploy.terminal.adapter_options import AdapterDirectories, named_directories
from chameleon_deploy.terminal.hypernetwork_options import EncoderDirectory, HypernetworkDirectory, TargetOrder
from chameleon_deploy.verify.gates import require_passed
from chameleon_deploy.verify.here import verify_here
from chameleon_deploy.verify.report import check_sheet
from chameleon_deploy.verify.run import LONGEST, MAX_TOKENS, VerifyOptions, verify_bundle


def main(
    bundle: console.BundleArgument,
    reference: Annotated[
        Path | None,
        typer.Option(help="The checkpoint, or with --adapter or --hypernetwork the base model, of the bundle."),
    ] = None,
    here: Annotated[
        bool, typer.Option("--here", help="Compare with what export recorded instead: does this machine compute it?")
    ] = False,
    base: Annotated[
        str | None, typer.Option(help="Base model, if the checkpoint's reference to it no longer holds.")
    ] = None,
    adapter: AdapterDirectories = None,
    hypernetwork: HypernetworkDirectory = None,
    target_order: TargetOrder = None,
    encoder: EncoderDirectory = None,
    text: Annotated[list[Path] | None, typer.Option(help="Text to verify on; default: Python's documentation.")] = None,
    provider: Annotated[str, typer.Option(help="cpu, cuda, tensorrt or auto.")] = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="Of ONNX Runtime.")] = None,
    max_kl: Annotated[
        float | None, typer.Option(min=0, help="Accept a mean KL up to this value and record it; default: the gate.")
    ] = None,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Read fewer texts, begin no check after a minute, and say what is left out."),
    ] = False,
    longest: Annotated[
        int, typer.Option(min=MAX_TOKENS, help="Tokens of the longest text, if the model has as many positions.")
    ] = LONGEST,
    as_json: Annotated[bool, typer.Option("--json", help="Print the record as JSON.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the record as JSON to this file.")] = None,
) -> None:
    """Check every numeric gate against the PyTorch reference, or with --here what the bundle computes on this machine
    against its record, in seconds and without PyTorch; exit 1 if one is missed.
    """
    console.check_output(out)
    if here:
        _refuse(reference=reference, base=base, adapter=adapter, hypernetwork=hypernetwork, target_order=target_order,
                encoder=encoder, text=text, max_kl=max_kl, quick=quick)  # fmt: skip
        checks, record = verify_here(console.bundle_path(bundle), provider, threads)
    else:
        if reference is None:
            raise typer.BadParameter("name the --reference that the bundle was exported from, or pass --here")
        from chameleon_deploy.reference.source import add_encoder, load_source
        from chameleon_deploy.reference.text_to_lora import text_to_lora_files

        network = text_to_lora_files(hypernetwork, target_order)
        checkpoint = load_source(reference, base, named_directories(adapter), network=network)
        if encoder is not None:
            add_encoder(checkpoint, encoder)
        path = console.bundle_path(bundle)
        options = VerifyOptions(text, threads, provider, keep_trunk=False, max_kl=max_kl, quick=quick, longest=longest)
        with console.progress() as report:
            checks, record = verify_bundle(path, checkpoint, report, options)
    console.tell_provider(provider, record["provider"])
    if out:
        console.write_json(record, out)
    if as_json:
        print(json.dumps(record))
    else:
        console.show(check_sheet(checks))
        if here:
            machine = record["machine"]
            weights = (
                f", {machine['integer weights']} weights in integer products" if "integer weights" in machine else ""
            )
            print(f"{record['provider']} on {machine['processor']}{weights}")
    require_passed(checks)


def _refuse(**options: Any) -> None:
    """Raise BadParameter for options of a comparison with the reference."""
    given = [f"--{name.replace('_', '-')}" for name, value in options.items() if value]
    if given:
        raise typer.BadParameter(f"--here compares with the bundle's record: leave out {', '.join(given)}")


if __name__ == "__main__":
    console.run(main)

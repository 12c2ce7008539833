"""`python -m chameleon_deploy.export`: export a checkpoint to a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from chameleon_deploy.contract.bundle import MANIFEST, ParitySummary, Precision
from chameleon_deploy.contract.provenance import read_signing_key
from chameleon_deploy.errors import InputError
from chameleon_deploy.runtime.device.engines import import_tensorrt, target_device
from chameleon_deploy.terminal import console
from chameleon_deploy.terminal.adapter_options import AdapterDirectories, named_directories


def main(
    source: Annotated[str, typer.Argument(metavar="CHECKPOINT|RECIPE.toml|BASE|BUNDLE", help="What to export.")],
    out: Annotated[
        Path | None, typer.Option(help="Bundle directory to write; with --target triton, the model repository.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Base model, if the checkpoint's reference to it no longer holds.")
    ] = None,
    precision: Annotated[
        Precision | None, typer.Option(help="Precision of the weights; default: the recipe's, else fp32.")
    ] = None,
    target: Annotated[
        Literal["onnx", "tensorrt", "triton"] | None,
        typer.Option(
            help="tensorrt also builds engines into the local cache; triton adds a bundle to a model repository; "
            "default: the recipe's, else onnx."
        ),
    ] = None,
    adapter: AdapterDirectories = None,
    text: Annotated[list[Path] | None, typer.Option(help="Text to verify on; default: Python's documentation.")] = None,
    calibration: Annotated[
        list[Path] | None, typer.Option(help="Text that int8 scales are measured on; default: the package's own.")
    ] = None,
    max_kl: Annotated[
        float | None, typer.Option(min=0, help="Accept a mean KL up to this value and record it; default: the gate.")
    ] = None,
    sign: Annotated[
        Path | None, typer.Option(metavar="KEY", help="Sign the bundle with this Ed25519 private key, PEM.")
    ] = None,
    verify: Annotated[bool, typer.Option("--verify/--no-verify", help="Check the numeric gates first.")] = True,
) -> None:
    """Export a checkpoint (ours, a PEFT LoRA of lm_head, or the authors' state dict) or the checkpoint that a recipe
    names.

    With --target tensorrt SOURCE may also be a finished bundle: its engines are built. With --target triton it must be
    one. With --adapter it is a base model, or a bundle that has adapters: then --out is an adapter file for it.
    """
    if target == "triton":
        write_repository(source, out)
        return
    adapters = named_directories(adapter)
    if (Path(source) / MANIFEST).is_file():
        if adapters:
            export_adapter(Path(source), adapters, out)
            return
        if target != "tensorrt" or out is not None or sign is not None:
            raise InputError(f"{source} is a bundle already: pass it with --target tensorrt alone to build its engines")
        build_engines(Path(source))
        return
    if max_kl is not None and not verify:
        raise InputError("--max-kl goes with verification: leave out --no-verify")
    signer = None if sign is None else read_signing_key(sign)
    if out is None:
        raise typer.BadParameter("--out is missing: name the bundle directory to write")
    from chameleon_deploy.export.exporter import export_bundle
    from chameleon_deploy.export.recipe import Recipe, read_recipe
    from chameleon_deploy.reference.source import load_source
    from chameleon_deploy.verify.report import check_sheet, require_passed
    from chameleon_deploy.verify.run import summary, verify_bundle

    if adapters and source.endswith(".toml"):
        raise InputError("--adapter goes with a base model: name it instead of a recipe")
    recipe = read_recipe(Path(source)) if source.endswith(".toml") else Recipe(checkpoint=source)
    target = target or recipe.target
    if target == "tensorrt":
        target_device(import_tensorrt())  # report what is missing before the work begins
    checkpoint = load_source(Path(recipe.checkpoint), base or recipe.base, adapters)

    with console.progress() as report:

        def gates(directory: Path) -> tuple[ParitySummary, dict[str, Any]]:
            checks, record = verify_bundle(directory, checkpoint, text, None, report, keep_trunk=False, max_kl=max_kl)
            if not record["verified"]:
                console.show(check_sheet(checks), to=console.stderr)
            require_passed(checks)  # raises, so that the bundle is not published
            return summary(checks, max_kl), record

        manifest = export_bundle(
            checkpoint,
            out,
            gates if verify else None,
            recipe.limits,
            precision or recipe.precision,
            signer,
            calibration,
            report,
        )
    size = sum(file.size for file in manifest.files.values())
    counts, parity = manifest.parameters, manifest.parity
    console.stdout.print(
        f"{out}: {size / 1e6:.1f} MB, base {counts.base:,} + hypernetwork {counts.hypernetwork:,} parameters, "
        f"{counts.factors:,} factors, regime {manifest.adaptation.regime}"
    )
    console.stdout.print(
        f"verified: {parity.checks} checks, largest logit difference {parity.max_abs_logit_difference:.2g}"
        if parity.verified
        else "not verified (--no-verify)"
    )
    if target == "tensorrt":
        build_engines(out)


def export_adapter(bundle: Path, adapters: dict[str, Path], out: Path | None) -> None:
    """Write an adapter file for a finished bundle and others of the same base."""
    if out is None or out.suffix != ".safetensors" or len(adapters) != 1:
        raise InputError("with a BUNDLE pass one --adapter NAME=DIR and --out FILE.safetensors")
    from chameleon_deploy.contract.adapter_file import write_adapter
    from chameleon_deploy.contract.bundle import open_bundle
    from chameleon_deploy.reference.peft_lora import read_peft

    opened = open_bundle(bundle)
    spec = opened.manifest.adaptation
    if not spec.base_digest:
        raise InputError(f"{bundle} was exported without adapters: export its base model with --adapter first")
    layers = {target.name: (target.in_features, target.out_features) for target in spec.targets}
    ((name, directory),) = adapters.items()
    factors = read_peft(directory, layers, opened.token_embedding())  # a tied head is all that a bundle has to compare
    console.check_output(out)
    write_adapter(out, factors, spec)
    rank = len(next(iter(factors.values())))
    console.stdout.print(
        f"{out}: adapter {name}, {len(factors) // 2} layers, rank {rank}, {out.stat().st_size / 1e6:.1f} MB"
    )


def write_repository(source: str, out: Path | None) -> None:
    """Add a bundle to a model repository of Triton, and print its path there."""
    from chameleon_deploy.export import triton

    if out is None:
        raise typer.BadParameter("--out is missing: name the model repository")
    if not (Path(source) / MANIFEST).is_file():
        raise InputError(f"{source} is not a bundle: export it first, then pass the bundle with --target triton")
    console.stdout.print(f"{triton.write_repository(Path(source), out)}", soft_wrap=True)


def build_engines(bundle: Path) -> None:
    """Build the engines that are not in the local cache yet, and print their path."""
    from chameleon_deploy.export import tensorrt

    with console.progress() as report:
        path, device = tensorrt.build_engines(bundle, report)
    size = sum(file.stat().st_size for file in path.iterdir())
    console.stdout.print(
        f"{path}: {size / 1e6:.1f} MB, engines for {device.name} (compute capability {device.compute_capability})",
        soft_wrap=True,  # a path is copied from the terminal in one piece
    )


if __name__ == "__main__":
    console.run(main)

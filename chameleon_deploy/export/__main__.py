"""`python -m chameleon_deploy.export`: export a checkpoint to a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from chameleon_deploy import console
from chameleon_deploy.bundle import MANIFEST, ParitySummary, Precision
from chameleon_deploy.engines import import_tensorrt, target_device
from chameleon_deploy.errors import InputError


def main(
    source: Annotated[str, typer.Argument(metavar="CHECKPOINT|RECIPE.toml|BUNDLE", help="What to export.")],
    out: Annotated[Path | None, typer.Option(help="Bundle directory to write.")] = None,
    base: Annotated[
        str | None, typer.Option(help="Base model, if the checkpoint's reference to it no longer holds.")
    ] = None,
    precision: Annotated[
        Precision | None, typer.Option(help="Precision of the weights; default: the recipe's, else fp32.")
    ] = None,
    target: Annotated[
        Literal["onnx", "tensorrt"] | None,
        typer.Option(help="tensorrt also builds engines into the local cache; default: the recipe's, else onnx."),
    ] = None,
    text: Annotated[list[Path] | None, typer.Option(help="Text to verify on; default: Python's documentation.")] = None,
    calibration: Annotated[
        list[Path] | None, typer.Option(help="Text that int8 scales are measured on; default: the package's own.")
    ] = None,
    max_kl: Annotated[
        float | None, typer.Option(min=0, help="Accept a mean KL up to this value and record it; default: the gate.")
    ] = None,
    verify: Annotated[bool, typer.Option("--verify/--no-verify", help="Check the numeric gates first.")] = True,
) -> None:
    """Export a checkpoint (ours, a PEFT LoRA of lm_head, or the authors' state dict) or the checkpoint that a recipe
    names.

    With --target tensorrt SOURCE may also be a finished bundle: its engines are built.
    """
    if (Path(source) / MANIFEST).is_file():
        if target != "tensorrt" or out is not None:
            raise InputError(f"{source} is a bundle already: pass it with --target tensorrt alone to build its engines")
        build_engines(Path(source))
        return
    if max_kl is not None and not verify:
        raise InputError("--max-kl goes with verification: leave out --no-verify")
    if out is None:
        raise typer.BadParameter("--out is missing: name the bundle directory to write")
    from chameleon_deploy.export.exporter import export_bundle
    from chameleon_deploy.export.recipe import Recipe, read_recipe
    from chameleon_deploy.reference.checkpoint import load_checkpoint
    from chameleon_deploy.verify.report import check_sheet, require_passed
    from chameleon_deploy.verify.run import summary, verify_bundle

    recipe = read_recipe(Path(source)) if source.endswith(".toml") else Recipe(checkpoint=source)
    target = target or recipe.target
    if target == "tensorrt":
        target_device(import_tensorrt())  # report what is missing before the work begins
    checkpoint = load_checkpoint(Path(recipe.checkpoint), base or recipe.base)

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

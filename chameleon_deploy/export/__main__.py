"""`python -m chameleon_deploy.export`: turn a checkpoint into a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from chameleon_deploy import console
from chameleon_deploy.bundle import ParitySummary


def main(
    source: Annotated[str, typer.Argument(metavar="CHECKPOINT|RECIPE.toml", help="What to export.")],
    out: Annotated[Path, typer.Option(help="Bundle directory to write.")],
    base: Annotated[
        str | None, typer.Option(help="Base model, where the checkpoint's own reference has moved.")
    ] = None,
    precision: Annotated[
        Literal["fp32"] | None, typer.Option(help="Of the weights; fp32 unless a recipe says.")
    ] = None,
    target: Annotated[Literal["onnx"] | None, typer.Option(help="Graphs to build; onnx unless a recipe says.")] = None,
    text: Annotated[list[Path] | None, typer.Option(help="Text to verify on; else Python's own documentation.")] = None,
    verify: Annotated[bool, typer.Option("--verify/--no-verify", help="Check the numeric gates first.")] = True,
) -> None:
    """Export a checkpoint (ours, a PEFT LoRA of lm_head, or the authors' state dict) or what a recipe names."""
    from chameleon_deploy.export.exporter import export_bundle
    from chameleon_deploy.export.recipe import Recipe, read_recipe
    from chameleon_deploy.reference.checkpoint import load_checkpoint
    from chameleon_deploy.verify import check_table, require_passed, summary, verify_bundle

    recipe = read_recipe(Path(source)) if source.endswith(".toml") else Recipe(checkpoint=source)
    checkpoint = load_checkpoint(Path(recipe.checkpoint), base or recipe.base)

    with console.progress() as report:

        def gates(directory: Path) -> tuple[ParitySummary, dict[str, Any]]:
            checks, record = verify_bundle(directory, checkpoint, text, None, report)
            if not record["verified"]:
                console.stderr.print(check_table(checks))
            require_passed(checks)  # raises: the bundle is not published
            return summary(checks), record

        manifest = export_bundle(checkpoint, out, gates if verify else None, recipe.limits)
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


if __name__ == "__main__":
    console.run(main)

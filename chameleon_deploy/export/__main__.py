"""`python -m chameleon_deploy.export`: export a checkpoint or a base model to a bundle."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from chameleon_deploy.contract.bundle import MANIFEST, ParitySummary, Precision
from chameleon_deploy.contract.manifest import PRECISION_USES
from chameleon_deploy.contract.provenance import read_signing_key
from chameleon_deploy.errors import InputError
from chameleon_deploy.terminal import console
from chameleon_deploy.terminal.adapter_options import AdapterDirectories, named_directories
from chameleon_deploy.terminal.hypernetwork_options import EncoderDirectory, HypernetworkDirectory, TargetOrder
from chameleon_deploy.terminal.texts import read_file


def main(
    source: Annotated[str, typer.Argument(metavar="CHECKPOINT|RECIPE.toml|BASE", help="What to export.")],
    out: Annotated[Path, typer.Option(help="Bundle directory to write.")],
    base: Annotated[
        str | None, typer.Option(help="Base model, if the checkpoint's reference to it no longer holds.")
    ] = None,
    precision: Annotated[
        Precision | None,
        typer.Option(
            help="Precision of the weights; default: the recipe's, else fp32. "
            + "; ".join(f"{name} is for {use}" for name, use in PRECISION_USES.items())
            + "."
        ),
    ] = None,
    adapter: AdapterDirectories = None,
    adaptable: Annotated[
        list[str] | None,
        typer.Option(
            metavar="attention|mlp|all|NAME", help="Layers of a base model that adapters may update later; repeatable."
        ),
    ] = None,
    max_rank: Annotated[
        int | None, typer.Option(min=1, max=1024, help="Largest rank of those adapters; default: 64.")
    ] = None,
    hypernetwork: HypernetworkDirectory = None,
    target_order: TargetOrder = None,
    encoder: EncoderDirectory = None,
    examples: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE.jsonl", help="Texts with their task's vector, by whose loss --target-order is checked."
        ),
    ] = None,
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
    chat_template: Annotated[
        Path | None, typer.Option(help="Chat template in Jinja; default: the model's own, if it has one.")
    ] = None,
    verify: Annotated[bool, typer.Option("--verify/--no-verify", help="Check the numeric gates first.")] = True,
) -> None:
    """Export a checkpoint (ours, a PEFT LoRA, which is merged unless it is of lm_head alone, or the authors' state
    dict), what a recipe names, or a base model (a directory in Hugging Face format, a GGUF file, a hub id): alone, with
    adapters, for adapters that are loaded later, or with a released text-to-LoRA network.
    """
    adapters = named_directories(adapter)
    if (Path(source) / MANIFEST).is_file():
        raise InputError(
            f"{source} is a bundle already: `engines`, `triton` and `adapter` build from bundles, `export` from models"
        )
    if max_kl is not None and not verify:
        raise InputError("--max-kl goes with verification: leave out --no-verify")
    signer = None if sign is None else read_signing_key(sign)
    template = None if chat_template is None else read_file(chat_template)
    from chameleon_deploy.export.exporter import Publication, export_bundle
    from chameleon_deploy.export.recipe import Recipe, read_recipe
    from chameleon_deploy.reference.source import add_encoder, load_source
    from chameleon_deploy.reference.text_to_lora import text_to_lora_files
    from chameleon_deploy.verify.data_checks import OTHER_TOKENIZER
    from chameleon_deploy.verify.gates import require_passed
    from chameleon_deploy.verify.report import check_sheet
    from chameleon_deploy.verify.run import VerifyOptions, summary, verify_bundle

    if (adapters or hypernetwork) and source.endswith(".toml"):
        raise InputError("--adapter and --hypernetwork go with a base model: name it instead of a recipe")
    network = text_to_lora_files(hypernetwork, target_order, examples or ())
    recipe = read_recipe(Path(source)) if source.endswith(".toml") else Recipe(checkpoint=source)
    layers = adaptable or recipe.adaptable
    ranks = recipe.max_rank if max_rank is None else max_rank
    if ranks is not None and not layers:
        raise InputError("--max-rank is of adapters that are loaded later: name their layers with --adaptable")
    checkpoint = load_source(Path(recipe.checkpoint), base or recipe.base, adapters, layers, ranks, network)
    if encoder is not None:
        add_encoder(checkpoint, encoder)
    if template is not None:
        checkpoint.trunk.chat = replace(checkpoint.trunk.chat, template=template)

    with console.progress() as report:

        def gates(directory: Path) -> tuple[ParitySummary, dict[str, Any]]:
            options = VerifyOptions(text, keep_trunk=False, max_kl=max_kl)
            checks, record = verify_bundle(directory, checkpoint, report, options)
            for check in checks:
                if check.name == OTHER_TOKENIZER and check.value:
                    console.stderr.print(f"{check.value:.0f} {check.name} ({check.note})")
            if not record["verified"]:
                console.show(check_sheet(checks), to=console.stderr)
            require_passed(checks)  # raises, so that the bundle is not published
            return summary(checks, max_kl), record

        publication = Publication(gates if verify else None, signer)
        manifest = export_bundle(
            checkpoint, out, publication, recipe.limits, precision or recipe.precision, calibration, report
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


if __name__ == "__main__":
    console.run(main)

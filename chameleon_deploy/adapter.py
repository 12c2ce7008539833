"""`python -m chameleon_deploy.adapter`: write an adapter file for the bundles of one base model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from chameleon_deploy.contract.adapter_file import write_adapter
from chameleon_deploy.contract.bundle import open_bundle
from chameleon_deploy.errors import InputError
from chameleon_deploy.reference.peft_lora import read_peft
from chameleon_deploy.terminal import console


def main(
    bundle: Annotated[Path, typer.Argument(help="Bundle directory, whose targets include the adapter's layers.")],
    peft: Annotated[Path, typer.Option(metavar="DIR", help="PEFT LoRA directory.")],
    out: Annotated[Path, typer.Option(metavar="FILE.safetensors", help="Adapter file to write.")],
) -> None:
    """Write an adapter file from a PEFT LoRA, for a bundle that takes adapters and others of the same base model."""
    if out.suffix != ".safetensors":
        raise InputError(f"--out {out}: name a .safetensors file")
    opened = open_bundle(bundle)
    spec = opened.manifest.adaptation
    if not spec.base_digest or not spec.targets:
        raise InputError(
            f"{bundle} takes no adapters: export its base model with --adaptable LAYERS or --adapter first"
        )
    layers = {target.name: (target.in_features, target.out_features) for target in spec.targets}
    factors = read_peft(peft, layers, opened.token_embedding())  # a tied head is all that a bundle has to compare
    rank = len(next(iter(factors.values())))
    if spec.regime == "base" and rank > spec.rank:
        raise InputError(f"{peft} has rank {rank}: {bundle} was exported with --max-rank {spec.rank}")
    console.check_output(out)
    write_adapter(out, factors, spec)
    console.stdout.print(f"{out}: {len(factors) // 2} layers, rank {rank}, {out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    console.run(main)

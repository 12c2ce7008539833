"""`python -m chameleon_deploy.verify_signature`: check who made a bundle, and that it is whole."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from chameleon_deploy.contract.bundle import open_bundle
from chameleon_deploy.errors import CheckFailedError, SignatureError
from chameleon_deploy.terminal import console


def main(
    bundle: Annotated[Path, typer.Argument(help="Bundle directory.")],
    trusted_key: Annotated[list[Path], typer.Option(help="Ed25519 public key, PEM; may be given several times.")],
) -> None:
    """Check that a trusted key signed a bundle and that every file has its digest; exit 1 if none did."""
    try:
        opened = open_bundle(bundle, trusted_key)
    except SignatureError as error:
        raise CheckFailedError(f"{error} [{error.code}]") from error
    print(f"{bundle}: signed by {opened.signed_by}, {len(opened.manifest.files)} files intact, digest {opened.digest}")


if __name__ == "__main__":
    console.run(main)

"""`python -m chameleon_deploy.adapter`: write an adapter file, or an update that a bundle generates as a PEFT LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
import typer

import chameleon_deploy
from chameleon_deploy.contract.adapter_file import max_rank, write_adapter
from chameleon_deploy.contract.bundle import FloatArray, open_bundle
from chameleon_deploy.contract.peft_lora import read_invocation, read_peft, write_peft
from chameleon_deploy.errors import InputError
from chameleon_deploy.runtime import Runtime
from chameleon_deploy.terminal import console


def main(
    bundle: Annotated[Path, typer.Argument(help="Bundle directory, whose targets include the adapter's layers.")],
    out: Annotated[Path, typer.Option(metavar="PATH", help="FILE.safetensors with --peft, else a new directory.")],
    peft: Annotated[Path | None, typer.Option(metavar="DIR", help="PEFT LoRA to write as an adapter file.")] = None,
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Text whose update is generated, as in mode request.")
    ] = None,
    cluster: Annotated[
        int | None, typer.Option(metavar="N", help="Cluster whose update is generated, as in mode centroid.")
    ] = None,
    conditioning: Annotated[
        Path | None, typer.Option(metavar="FILE", help="JSON list of numbers whose update is generated.")
    ] = None,
) -> None:
    """Write an adapter file from a PEFT LoRA, for a bundle that takes adapters and others of the same base model, or
    write the update that a bundle generates for a text, a cluster or a vector as a PEFT LoRA of its base model.
    """
    if sum(source is not None for source in (peft, text, cluster, conditioning)) != 1:
        raise InputError("pass one of --peft DIR, --text FILE, --cluster N and --conditioning FILE")
    if peft is not None:
        _write_file(bundle, peft, out)
        return
    runtime = chameleon_deploy.load(bundle)
    vector = _vector(runtime, text, cluster, conditioning)
    sets = runtime.backend.generate_factors(vector[None]).in_memory()  # of plain layers, in any precision
    factors = {name: np.asarray(array)[0] for name, array in sets.tensors.items()}
    write_peft(out, factors)
    console.stdout.print(f"{out}: {len(factors) // 2} layers, rank {len(next(iter(factors.values())))}")


def _write_file(bundle: Path, peft: Path, out: Path) -> None:
    if out.suffix != ".safetensors":
        raise InputError(f"--out {out}: name a .safetensors file")
    opened = open_bundle(bundle)
    spec = opened.manifest.adaptation
    if not spec.base_digest or not spec.targets:
        raise InputError(
            f"{bundle} takes no adapters: export its base model with --adaptable LAYERS or --adapter first"
        )
    layers = {target.name: (target.in_features, target.out_features) for target in spec.targets}
    factors = read_peft(
        peft, layers, opened.token_embedding().stored
    )  # a tied head is all that a bundle has to compare
    rank = len(next(iter(factors.values())))
    if rank > max_rank(spec):
        raise InputError(f"{peft} has rank {rank}: {bundle} was exported with --max-rank {spec.rank}")
    console.check_output(out)
    write_adapter(out, factors, spec, read_invocation(peft))
    console.stdout.print(f"{out}: {len(factors) // 2} layers, rank {rank}, {out.stat().st_size / 1e6:.1f} MB")


def _vector(runtime: Runtime, text: Path | None, cluster: int | None, conditioning: Path | None) -> FloatArray:
    """Return what the hypernetwork reads, float32 [width]. Raises InputError."""
    spec, path = runtime.manifest.adaptation, runtime.bundle.path
    if spec.regime != "chameleon":
        raise InputError(f"{path} generates no updates: it has no hypernetwork")
    if (conditioning is not None) != (spec.conditioning_size > 0):
        wanted = "--conditioning FILE" if spec.conditioning_size else "--text FILE or --cluster N"
        raise InputError(f"the hypernetwork of {path} was not trained for that: pass {wanted}")
    if conditioning is not None:
        return _read_vector(conditioning, spec.conditioning_size)
    if cluster is not None:
        centroids = runtime.bundle.centroids()
        if not 0 <= cluster < len(centroids):
            raise InputError(f"--cluster {cluster}: {path} has {len(centroids)} clusters, counted from 0")
        return np.asarray(centroids[cluster], np.float32)
    assert text is not None  # noqa: S101  (one of the three)
    try:
        content = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {text}: {getattr(error, 'strerror', None) or 'it is not UTF-8'}") from error
    return np.asarray(runtime.embed(runtime.encode([content]))[0][0], np.float32)


def _read_vector(file: Path, size: int) -> FloatArray:
    try:
        vector = np.array(msgspec.json.decode(file.read_bytes(), type=list[float]), np.float32)
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}") from error
    except msgspec.MsgspecError as error:
        raise InputError(f"{file}: expected a JSON list of {size} numbers: {error}") from error
    if len(vector) != size or not np.isfinite(vector).all():
        raise InputError(f"{file}: expected {size} finite numbers, got {len(vector)}")
    return vector


if __name__ == "__main__":
    console.run(main)

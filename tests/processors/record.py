"""What the tests of this folder compare with, which they read without PyTorch: `python -m tests.processors.record DIR`.

DIR/PRECISION/      the first layer of the tiny model as a bundle of each precision
DIR/reference.npz   texts, and the PyTorch reference's logits for them in mode `cohort`: `Reference`
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import msgspec
import numpy as np

from chameleon_deploy.contract.bundle import FloatArray, Precision

REPOSITORY = Path(__file__).parents[2]
MODEL = REPOSITORY / "models" / "tiny" / "chameleon"
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
ROWS, TOKENS = 3, 8  # emulated AVX2 takes 40 ms for a token of five layers of the tiny model in float32


@dataclass
class Reference:
    """What the PyTorch reference gives for a batch.

    rows    token ids [ROWS][TOKENS]
    logits  float32 [ROWS, TOKENS, vocab]
    """

    rows: list[list[int]]
    logits: FloatArray

    @classmethod
    def read(cls, directory: Path) -> Reference:
        with np.load(directory / "reference.npz") as arrays:
            return cls(arrays["rows"].tolist(), arrays["logits"])


def record(directory: Path) -> None:
    from chameleon_deploy.export.exporter import export_bundle
    from chameleon_deploy.reference import inference
    from chameleon_deploy.reference.checkpoint import load_checkpoint
    from chameleon_deploy.verify.run import verification_rows

    checkpoint = load_checkpoint(MODEL)
    checkpoint.trunk.causal_lm.transformer.h = checkpoint.trunk.causal_lm.transformer.h[:1]
    checkpoint.trunk.config.n_layer = 1
    checkpoint = replace(
        checkpoint,
        trunk=replace(checkpoint.trunk),  # without what was derived from five
        config=msgspec.structs.replace(checkpoint.config, alpha=3.0),  # so that few tokens show the factors in int4 too
    )
    rows = [ids[:TOKENS] for ids in verification_rows(checkpoint) if len(ids) >= TOKENS][:ROWS]
    adaptation, reference = inference.adapt(checkpoint, rows, "cohort"), inference.RowLogits(checkpoint)
    logits: list[Any] = [reference(ids, adaptation, row).numpy() for row, ids in enumerate(rows)]
    directory.mkdir(parents=True, exist_ok=True)
    np.savez(directory / "reference.npz", rows=rows, logits=logits)
    calibration = [REPOSITORY / "README.md"]  # little text, so that int8 takes a few seconds
    for precision in PRECISIONS:
        export_bundle(checkpoint, directory / precision, precision=precision, calibration=calibration)


if __name__ == "__main__":
    record(Path(sys.argv[1]))

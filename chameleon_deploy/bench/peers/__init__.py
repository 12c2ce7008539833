"""The engines that `bench` compares: each does the same work through its public interface.

bundle.py        the bundle as users run it, and two ablations: one call per cluster, and full logits

Only in a clone, not in the wheel:

without_lora.py  the bundle with LoRA removed from its graphs
pytorch.py       the reference, eager and compiled
pytorch_gpu.py   the same on a GPU, for `gpu_check`
ctranslate2.py   the frozen base model only: it does not adapt
openvino.py      the frozen base model only: it does not adapt
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from chameleon_deploy.bench.timing import Lap

if TYPE_CHECKING:
    from chameleon_deploy.reference.checkpoint import Checkpoint
    from chameleon_deploy.runtime import Runtime

Rows = Sequence[Sequence[int]]

ADAPT, PREFILL, DECODE = "adapt", "prefill", "decode"  # laps: the factors, the first tokens, all other tokens
FROM_A_CLONE = "not in the wheel: run bench from a clone of the repository"


class Peer(Protocol):
    """One engine.

    name               with the engine's own precision, if it is not the bundle
    adapts             whether it applies the factors; otherwise it is checked against the frozen base model
    scores, generates  what it is compared in
    """

    name: str
    precision: str
    adapts: bool
    scores: bool
    generates: bool

    def score(self, rows: Rows) -> Any:
        """Return the log-probability of every token after the first, [batch, length - 1], of rows of one length."""

    def generate(self, rows: Rows, num_tokens: int, lap: Lap) -> Any:
        """Return greedy tokens, int [batch, num_tokens], of rows of one length; no token ends a row."""


def open_peers(
    runtime: Runtime, checkpoint: Checkpoint, threads: int, directory: Path, foreign: bool
) -> tuple[list[Peer], dict[str, str]]:
    """Open the bundle, then all other engines of this machine, in the bundle's precision if they have it.

    directory  an empty one, for converted models
    foreign    also open the engines that take half a minute to convert or to compile

    Returns the engines, and by name the reasons why others are missing.
    """
    from chameleon_deploy.bench.peers.bundle import Bundle, FullLogits, OneCallPerCluster

    trunk, precision = checkpoint.trunk, runtime.manifest.precision

    def without_lora() -> Peer:
        from chameleon_deploy.bench.peers.without_lora import WithoutLoRA

        return WithoutLoRA(runtime)

    def pytorch(compiled: bool) -> Peer:
        from chameleon_deploy.bench.peers.pytorch import PyTorch

        return PyTorch(checkpoint, runtime.mode, compiled)

    def ctranslate2() -> Peer:
        from chameleon_deploy.bench.peers.ctranslate2 import CTranslate2

        return CTranslate2(trunk, precision, threads, directory)

    def openvino() -> Peer:
        from chameleon_deploy.bench.peers.openvino import OpenVINO

        return OpenVINO(trunk, precision, threads)

    openers: dict[str, Callable[[], Peer]] = {
        "without LoRA": without_lora,
        "PyTorch eager fp32": lambda: pytorch(compiled=False),
    }
    if foreign:
        openers |= {
            "torch.compile fp32": lambda: pytorch(compiled=True),
            f"CTranslate2 {precision}": ctranslate2,
            f"OpenVINO {precision}": openvino,
        }
    peers: list[Peer] = [Bundle(runtime), FullLogits(runtime), OneCallPerCluster(runtime)]
    missing = {}
    for name, opener in openers.items():
        try:
            peers.append(opener())
        except Exception as error:  # a foreign engine may raise anything
            missing[name] = reason(error)
    return peers, missing


def reason(error: Exception) -> str:
    """Return why an engine could not be opened, in one line."""
    if isinstance(error, ImportError) and error.name:
        if error.name.startswith(__name__):
            return FROM_A_CLONE
        return f"{error.name} is not installed: pip install 'chameleon-deploy[peers]'"
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]

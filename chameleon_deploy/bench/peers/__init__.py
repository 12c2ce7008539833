"""What `bench` compares the bundle with: engines that do the same work, each through the calls that its users make.

bundle.py       the bundle as users run it, without LoRA in its graph, and one call per cluster
pytorch.py      the reference, eager and compiled
pytorch_gpu.py  the same on a GPU, for `gpu_check`
ctranslate2.py  the frozen base model only: it does not adapt
openvino.py     the frozen base model only: it does not adapt
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from chameleon_deploy.reference.checkpoint import Checkpoint
    from chameleon_deploy.runtime import Runtime

Rows = Sequence[Sequence[int]]
Lap = Callable[[str], None]  # called with the name of the part of the work that ends now

PREFILL, DECODE = "prefill", "decode"  # the parts of a generation: up to the first tokens, and all others


class Peer(Protocol):
    """adapts             whether it applies the factors; one that does not is compared with the frozen base model
    scores, generates  what it is compared in
    """

    name: str
    precision: str
    adapts: bool
    scores: bool
    generates: bool

    def score(self, rows: Rows) -> Any:
        """Rows of one length.  -> log-probability of every token after the first, [batch, length - 1]"""

    def generate(self, rows: Rows, num_tokens: int, lap: Lap) -> Any:
        """Rows of one length.  -> int [batch, num_tokens], the best token at every step, whatever it is"""


def open_peers(
    runtime: Runtime, checkpoint: Checkpoint, threads: int, directory: Path, foreign: bool
) -> tuple[list[Peer], dict[str, str]]:
    """The bundle first, then all that can be had here, in the bundle's precision. -> them, and why others are missing

    directory  an empty one, for converted models
    foreign    also those that take half a minute to convert or to compile
    """
    from chameleon_deploy.bench.peers.bundle import Bundle, FullLogits, OneCallPerCluster
    from chameleon_deploy.bench.peers.ctranslate2 import CTranslate2
    from chameleon_deploy.bench.peers.openvino import OpenVINO
    from chameleon_deploy.bench.peers.pytorch import PyTorch
    from chameleon_deploy.bench.peers.without_lora import WithoutLoRA

    trunk, precision = checkpoint.trunk, runtime.manifest.precision
    openers: dict[str, Callable[[], Peer]] = {
        "without LoRA": lambda: WithoutLoRA(runtime),
        "PyTorch eager": lambda: PyTorch(checkpoint, runtime.mode, compiled=False),
    }
    if foreign:
        openers |= {
            "torch.compile": lambda: PyTorch(checkpoint, runtime.mode, compiled=True),
            f"CTranslate2 {precision}": lambda: CTranslate2(trunk, precision, threads, directory),
            f"OpenVINO {precision}": lambda: OpenVINO(trunk, precision, threads),
        }
    peers: list[Peer] = [Bundle(runtime), FullLogits(runtime), OneCallPerCluster(runtime)]
    missing = {}
    for name, opener in openers.items():
        try:
            peers.append(opener())
        except ImportError as error:
            missing[name] = f"{error.name} is not installed: pip install 'chameleon-deploy[peers]'"
        except Exception as error:  # whatever a foreign engine raises; the table says so
            missing[name] = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return peers, missing

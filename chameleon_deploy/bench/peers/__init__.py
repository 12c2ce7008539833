"""The engines that `bench` compares: each does the same work through its public interface.

bundle.py        the bundle as users run it, and two ablations: one call per cluster, and full logits

Only in a clone, not in the wheel:

without_lora.py  the bundle with LoRA removed from its graphs
pytorch.py       the reference, eager and compiled; in int8 by torchao
pytorch_gpu.py   the same on a GPU, for `gpu-check`
adapted.py       the layers of both that a checkpoint adapts
ctranslate2.py   the frozen base model only: it does not adapt
openvino.py      the frozen base model only: it does not adapt
llama_cpp.py     the frozen base model only: it does not adapt
own_process.py   a process of its own for an engine, which llama.cpp needs
gguf_writer.py   that model as llama.cpp's file
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from chameleon_deploy.bench.timing import Lap
from chameleon_deploy.contract.bundle import INTEGERS

if TYPE_CHECKING:
    from chameleon_deploy.reference.checkpoint import Checkpoint
    from chameleon_deploy.runtime import Runtime

Rows = Sequence[Sequence[int]]

ADAPT, PREFILL, DECODE = "adapt", "prefill", "decode"  # laps: the factors, the first tokens, all other tokens
LLAMA_TYPES = {"int8": "Q8_0", "int4": "Q4_K_M"}  # llama.cpp's types and mixes of types; else float32
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


@runtime_checkable
class Readable(Protocol):
    """An engine that also gives logits, so that its quality can be measured.

    size         bytes of its files; of PyTorch, of its parameters
    is_ablation  whether it is the bundle with one thing changed: its quality is the bundle's
    """

    name: str
    size: int
    is_ablation: bool

    def logits(self, ids: Sequence[int]) -> Any:
        """Return float32 [length, vocab] of one text, without adaptation."""


def open_peers(
    runtime: Runtime,
    checkpoint: Checkpoint,
    threads: int,
    directory: Path,
    foreign: bool,
    only: Sequence[str] = (),
) -> tuple[list[Peer], dict[str, str]]:
    """Open the bundle, then all other engines of this machine, in the bundle's precision if they have it.

    directory  an empty one, for converted models
    foreign    also open the engines that take half a minute to convert or to compile
    only       how the names of the engines begin that are opened beside the bundle; none for all

    Returns the engines, and by name the reasons why others are missing.
    """
    from chameleon_deploy.bench.peers.bundle import Bundle

    openers = _ablations(runtime) | _pytorch(runtime, checkpoint, "fp32", compiled=False)
    if foreign:
        openers |= _foreign(runtime, checkpoint, threads, directory)
    peers: list[Peer] = [Bundle(runtime)]
    missing = {}
    for name, opener in openers.items():
        if only and not name.startswith(tuple(only)):
            continue
        try:
            peers.append(opener())
        except Exception as error:  # a foreign engine may raise anything
            missing[name] = reason(error)
    return peers, missing


def _ablations(runtime: Runtime) -> dict[str, Callable[[], Peer]]:
    from chameleon_deploy.bench.peers.bundle import FullLogits, OneCallPerSet

    def without_lora() -> Peer:
        from chameleon_deploy.bench.peers.without_lora import WithoutLoRA

        return WithoutLoRA(runtime)

    return {
        "full logits": lambda: FullLogits(runtime),
        "one call per cluster": lambda: OneCallPerSet(runtime, "one call per cluster"),
        "without LoRA": without_lora,
    }


def _pytorch(runtime: Runtime, checkpoint: Checkpoint, precision: str, compiled: bool) -> dict[str, Callable[[], Peer]]:
    def pytorch() -> Peer:
        from chameleon_deploy.bench.peers.pytorch import PyTorch

        return PyTorch(checkpoint, runtime.mode, compiled, precision)

    return {f"{'torch.compile' if compiled else 'PyTorch eager'} {precision}": pytorch}


def _foreign(runtime: Runtime, checkpoint: Checkpoint, threads: int, directory: Path) -> dict[str, Callable[[], Peer]]:
    trunk, precision = checkpoint.trunk, runtime.manifest.precision

    def ctranslate2() -> Peer:
        from chameleon_deploy.bench.peers.ctranslate2 import CTranslate2

        return CTranslate2(trunk, precision, threads, directory)

    def openvino() -> Peer:
        from chameleon_deploy.bench.peers.openvino import OpenVINO

        return OpenVINO(trunk, precision, threads, directory)

    def llama_cpp(own: Path | None = None) -> Peer:
        from chameleon_deploy.bench.peers.llama_cpp import MIXES, LlamaCpp, converted_file
        from chameleon_deploy.bench.peers.own_process import OwnProcess

        if own:
            return OwnProcess(LlamaCpp, own, precision, threads)
        opener = partial(LlamaCpp, mix=MIXES.get(precision))
        return OwnProcess(opener, converted_file(trunk, precision, directory), precision, threads)

    openers = _pytorch(runtime, checkpoint, "fp32", compiled=True)
    openers |= {f"CTranslate2 {precision}": ctranslate2, f"OpenVINO {precision}": openvino}
    openers |= {f"llama.cpp {LLAMA_TYPES.get(precision, 'F32')}": llama_cpp}
    if precision == "int8":
        openers |= _pytorch(runtime, checkpoint, "int8", compiled=True)
    if precision in INTEGERS and trunk.gguf is not None:
        openers["llama.cpp, the file's own type"] = partial(llama_cpp, trunk.gguf)
    return openers


# Extras other than `peers`, by the module that they install.
EXTRAS = {"gguf": "peers-llama", "llama_cpp": "peers-llama", "torchao": "peers-torchao"}


def reason(error: Exception) -> str:
    """Return why an engine could not be opened, in one line."""
    if isinstance(error, ImportError) and error.name:
        if error.name.startswith(__name__):
            return FROM_A_CLONE
        extra = EXTRAS.get(error.name, "peers")
        return f"{error.name} is not installed: pip install 'chameleon-deploy[{extra}]'"
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]

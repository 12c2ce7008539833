"""Engines in processes of their own: results, laps and errors pass, a dead process is an error, and none is left."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chameleon_deploy.bench.peers import DECODE, PREFILL, Readable, reason
from chameleon_deploy.bench.peers.own_process import OwnProcess
from chameleon_deploy.bench.processors import Processors, own_processes
from chameleon_deploy.bench.timing import Case, Contestant, Part, measure
from tests.bench.stand_in import StandIn

REPOSITORY = Path(__file__).parents[2]
PARENT = """
import signal
from chameleon_deploy.bench.peers.own_process import OwnProcess
from tests.bench.stand_in import StandIn

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    peer = OwnProcess(StandIn)
    print(int(peer.logits([0])[0]), flush=True)
    peer.generate([[1]], 60, print)  # for a minute
"""


@pytest.fixture
def peer() -> OwnProcess:
    return OwnProcess(StandIn)


def test_results_and_laps_pass(peer: OwnProcess) -> None:
    assert isinstance(peer, Readable)
    assert (peer.name, peer.precision, peer.size) == ("stand-in", "fp32", 7)
    assert (peer.adapts, peer.scores, peer.generates, peer.is_ablation) == (False, True, True, False)
    ends: list[tuple[str, float]] = []
    chosen = peer.generate([[3], [4]], 2, lambda lap: ends.append((lap, time.perf_counter())))
    assert chosen.tolist() == [[3, 3], [3, 3]]
    assert [lap for lap, _ in ends] == [PREFILL, DECODE]
    assert ends[1][1] - ends[0][1] > 0.9  # a lap is reported when it ends
    (pid,) = set(peer.logits(range(1 << 20)).tolist())  # more than a pipe holds
    assert pid in own_processes()
    assert pid != os.getpid()


def test_what_the_engine_raises_is_raised_here(peer: OwnProcess) -> None:
    with pytest.raises(ValueError, match=r"^cannot generate 0 tokens$"):
        peer.generate([[3]], 0, print)
    assert peer.generate([[3]], 1, lambda lap: None).tolist() == [[3]]
    with pytest.raises(ModuleNotFoundError) as raised:
        OwnProcess(StandIn, ModuleNotFoundError("no such module", name="llama_cpp"))
    assert reason(raised.value) == "llama_cpp is not installed: pip install 'chameleon-deploy[peers-llama]'"


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL])
def test_a_signal_that_ends_the_process_is_named(peer: OwnProcess, number: signal.Signals) -> None:
    for _ in range(2):  # the process has ended before the second call
        with pytest.raises(RuntimeError, match=rf"^its process ended with {number.name}$"):
            peer.score([[1], [number]])


def test_an_answer_that_cannot_be_sent_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"^its process ended with exit code 1$"):
        OwnProcess(Unsendable)


class Unsendable(StandIn):
    """An engine with an attribute that cannot be pickled."""

    def __init__(self) -> None:
        self.name: Any = lambda: None


def test_a_benchmark_goes_on_without_the_engine(peer: OwnProcess) -> None:
    """It dies in its second sample."""
    baseline = Contestant(lambda lap: time.sleep(0.01), lambda _: 0.0, 1.0)
    dying = Contestant(lambda lap: peer.score([[4], [signal.SIGSEGV]]), lambda _: 0.0, 1.0)
    case = Case(Part("kind", "work", 1, "unit"), {"bundle": baseline, "dying": dying}, "bundle")
    (timing,) = measure(case, 3, lambda *_: None, 0)
    assert timing.failed == {"dying": "RuntimeError: its process ended with SIGSEGV"}
    assert timing.seconds.keys() == {"bundle"}


def test_its_processor_time_is_the_engines_own(peer: OwnProcess) -> None:
    before = Processors.now()
    peer.score([[0]])
    between = Processors.now()
    assert between.own - before.own > 0.19
    time.sleep(0.5)
    assert Processors.now().own - between.own < 0.05  # it waits at the pipe


def test_the_process_ends_with_the_peer(peer: OwnProcess) -> None:
    other = OwnProcess(StandIn)
    pids = {int(one.logits([0])[0]) for one in (peer, other)}
    assert len(pids & set(own_processes())) == 2
    del other
    gc.collect()
    assert len(pids & set(own_processes())) == 1
    assert peer.logits([0])[0] in pids


@pytest.fixture
def parent(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A parent in a process group of its own, whose child is in the middle of a call, and the child's id."""
    (tmp_path / "parent.py").write_text(PARENT)
    command = [sys.executable, str(tmp_path / "parent.py")]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None
            child = int(process.stdout.readline())
            assert process.stdout.readline() == f"{PREFILL}\n"
            yield process, child
        finally:
            process.kill()


def test_the_process_ends_with_its_parent(parent: tuple[subprocess.Popen[str], int]) -> None:
    process, child = parent
    process.kill()
    _, errors = process.communicate(timeout=60)  # when all that have its end of the pipe have ended
    assert errors == ""
    assert not _runs(child)


def test_ctrl_c_ends_both(parent: tuple[subprocess.Popen[str], int]) -> None:
    process, child = parent
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT
    assert errors.count("KeyboardInterrupt") == errors.count("Traceback") == 1  # the parent's
    assert not _runs(child)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False

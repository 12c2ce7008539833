"""A process of its own for an engine that ends the process it shares with another engine.

A call, each lap and the answer cross a pipe, which is timed with the engine: 0.2 ms for 8 rows of 128 tokens, 0.4 for
64 rows or for one of 8,175 tokens. Between calls the process waits at the pipe and uses no processor.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from chameleon_deploy.bench.peers import Peer, Rows
from chameleon_deploy.bench.timing import Lap


class OwnProcess:
    """A peer that runs in another process, which ends with this object or with the process that made it. See `Peer`.

    What the peer raises is raised here, and RuntimeError if its process ends.
    """

    name: str
    precision: str
    adapts: bool
    scores: bool
    generates: bool
    size: int
    is_ablation: bool

    def __init__(self, opener: Callable[..., Peer], *arguments: Any) -> None:
        """Start a process and open the peer in it.

        opener, arguments  of the peer; both are pickled
        """
        spawning = multiprocessing.get_context("spawn")  # a forked process would have the engines of this one
        self._pipe, theirs = spawning.Pipe()
        self._process = spawning.Process(target=_serve, args=(theirs, opener, arguments), daemon=True)
        self._process.start()
        theirs.close()  # so that the end of the process ends the pipe
        weakref.finalize(self, _end, self._process)
        vars(self).update(self._answer())

    def logits(self, ids: Sequence[int]) -> Any:
        return self._call("logits", ids)

    def score(self, rows: Rows) -> Any:
        return self._call("score", rows)

    def generate(self, rows: Rows, num_tokens: int, lap: Lap) -> Any:
        return self._call("generate", rows, num_tokens, lap=lap)

    def _call(self, method: str, *arguments: Any, lap: Lap | None = None) -> Any:
        try:
            self._pipe.send((method, arguments))
        except OSError:
            raise self._ended() from None
        return self._answer(lap)

    def _answer(self, lap: Lap | None = None) -> Any:
        while True:
            try:
                kind, value = self._pipe.recv()
            except (EOFError, OSError):
                raise self._ended() from None
            if kind == "error":
                raise value
            if kind == "result":
                return value
            if lap:
                lap(value)

    def _ended(self) -> RuntimeError:
        self._process.join()
        code = self._process.exitcode or 0
        return RuntimeError(f"its process ended with {signal.Signals(-code).name if code < 0 else f'exit code {code}'}")


def _end(process: BaseProcess) -> None:
    process.kill()
    process.join()


def _serve(pipe: Connection, opener: Callable[..., Peer], arguments: tuple[Any, ...]) -> None:
    """Open a peer, then answer calls until the pipe ends. The first answer has the peer's attributes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both processes, and this one ends with the other
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        peer = opener(*arguments)
    except Exception as error:  # a foreign engine may raise anything
        pipe.send(("error", error))
        return
    pipe.send(("result", {name: getattr(peer, name) for name in OwnProcess.__annotations__}))
    with suppress(EOFError):
        while True:
            method, given = pipe.recv()
            options = {"lap": lambda name: pipe.send(("lap", name))} if method == "generate" else {}
            try:
                answer = "result", getattr(peer, method)(*given, **options)
            except Exception as error:
                answer = "error", error
            pipe.send(answer)


def _end_with_parent() -> None:
    """End this process with its parent, in the middle of a call too."""
    parent = multiprocessing.parent_process()
    if parent:
        parent.join()
        os._exit(1)

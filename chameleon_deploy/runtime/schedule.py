"""What the engine decides: who is admitted next, and how much of a prompt is read at a time.

Admission is first come, first served, with a bounded number of exceptions.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, MutableSequence
from typing import Protocol, TypeVar

# How often a row may be overtaken by rows whose factor set is resident while its own has no room.
MAX_OVERTAKES = 16


class Waiting(Protocol):
    """overtaken  counted here"""

    overtaken: int

    @property
    def key(self) -> Hashable: ...


W = TypeVar("W", bound=Waiting)


def take_next(queue: MutableSequence[W], is_resident: Callable[[Hashable], bool], is_full: bool) -> W | None:
    """Remove and return the row that may be admitted next, where there is one.

    queue        in order of arrival
    is_resident  whether a factor set is in the table
    is_full      whether the table has no room for another
    """
    for place, row in enumerate(queue):
        if not is_full or is_resident(row.key):
            for overtaken in queue[:place]:
                overtaken.overtaken += 1
            del queue[place]
            return row
        if row.overtaken >= MAX_OVERTAKES:
            return None
    return None


def chunk_length(unread: int, chunk_tokens: int) -> int:
    """How many tokens of a prompt to read next, at most chunk_tokens.

    A single token is never left for the last chunk: it would be a step to the decoder, which rounds otherwise in int8.
    """
    return chunk_tokens - 1 if unread == chunk_tokens + 1 else min(unread, chunk_tokens)

"""The decisions of the engine: which row is admitted next, and what is prefilled in one call.

Rows are divided evenly: the next is of the request that has the fewest in the batch, among equals the first to come.
So a request of many rows takes all while nobody else waits, and others get theirs as its rows end. Factor sets that
have no room cause a bounded number of exceptions.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, MutableSequence, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

# How often rows with a resident factor set may overtake a row whose set has no room.
MAX_OVERTAKES = 16
# A call of the decoder takes the time of so many more tokens, since it reads all weights.
CALL_TOKENS = 32


@dataclass(frozen=True)
class Schedule:
    """A rule for how many prompt tokens are prefilled between two steps.

    chunk_tokens  prompt tokens of one call of the decoder
    reads_all     every prompt that is not read yet, else one call
    """

    chunk_tokens: int
    reads_all: bool = False


class Waiting(Protocol):
    """A waiting row.

    overtaken  counted here
    """

    overtaken: int

    @property
    def key(self) -> Hashable: ...


W = TypeVar("W", bound=Waiting)


def most_rows(places: int) -> int:
    """Return how many rows a request may have of the places that are free: half, so that it never takes all of them.

    A single row may take the last.
    """
    return max(places // 2, min(places, 1))


def take_next(
    queue: MutableSequence[W], running: Callable[[W], int], is_resident: Callable[[Hashable], bool], is_full: bool
) -> W | None:
    """Remove and return the row that may be admitted next, or None.

    queue        in order of arrival
    running      returns how many rows of a row's request are in the batch
    is_resident  returns whether a factor set is in the table
    is_full      whether the table has no room for another
    """
    in_turn = sorted(queue, key=running)
    for place, row in enumerate(in_turn):
        if not is_full or is_resident(row.key):
            for overtaken in in_turn[:place]:
                overtaken.overtaken += 1
            queue.remove(row)
            return row
        if row.overtaken >= MAX_OVERTAKES:
            return None
    return None


def chunk_length(remaining: int, chunk_tokens: int) -> int:
    """Return how many tokens of a prompt to prefill next, at most chunk_tokens.

    A single token is never left for the last chunk: the decoder would run it as a step, which rounds differently in
    int8.
    """
    return chunk_tokens - 1 if remaining == chunk_tokens + 1 else min(remaining, chunk_tokens)


def joined(lengths: Sequence[int], chunk_tokens: int) -> int:
    """Return how many of the first prompts to prefill in one call, at least 1.

    The call pads them to the longest: to chunk_tokens in all, and by no more than the calls that it saves are worth.
    Prompts of less than two tokens are alone: the decoder would run one token as a step, which rounds differently in
    int8.

    lengths  of whole prompts
    """
    longest = tokens = 0
    for count, length in enumerate(lengths):
        longest, tokens = max(longest, length), tokens + length
        padded = (count + 1) * longest
        if count and (
            min(length, lengths[0]) < 2 or padded > chunk_tokens or padded - tokens > count * CALL_TOKENS
        ):  # fmt: skip
            return count
    return len(lengths)

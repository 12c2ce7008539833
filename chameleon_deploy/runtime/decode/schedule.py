"""The decisions of the engine: which row is admitted next, and what is prefilled in one call.

Rows are divided evenly: the next is of the request that has the fewest in the batch, among equals the first to come.
So a request of many rows takes all while nobody else waits, and others get theirs as its rows end. Several tenants
share the rows as `engine/tenants.py` says, and each divides its own in this way. Factor sets that have no room cause a
bounded number of exceptions.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Protocol, TypeVar

# How often rows with a resident factor set may overtake a row whose set has no room.
MAX_OVERTAKES = 16
# A call of the decoder takes the time of so many more tokens, since it reads all weights.
CALL_TOKENS = 32
MIN_PREFILL_TOKENS = 8


@dataclass(frozen=True)
class Schedule:
    """A rule for how many prompt tokens are prefilled between two steps.

    prefill_tokens  prompt tokens of one call of the decoder
    reads_all       every prompt that is not read yet, else one call
    """

    prefill_tokens: int
    reads_all: bool = False


class Waiting(Protocol):
    """A waiting row.

    overtaken  counted here
    stream     of its request
    tenant     whose it is
    """

    overtaken: int

    @property
    def key(self) -> Hashable: ...

    @property
    def stream(self) -> Hashable: ...

    @property
    def tenant(self) -> Hashable: ...


W = TypeVar("W", bound=Waiting)


def most_rows(places: int) -> int:
    """Return how many rows a request may have of the places that are free: half, so that it never takes all of them.

    A single row may take the last.
    """
    return max(places // 2, min(places, 1))


def admissible(
    queue: Sequence[W],
    running: Mapping[Hashable, int],
    is_resident: Callable[[Hashable], bool],
    is_full: Callable[[], bool],
    next_tenant: Callable[[Iterable[Any]], Hashable | None] = lambda tenants: next(iter(tenants), None),
) -> Iterator[W]:
    """Yield the rows that may be admitted, in turn. Each is admitted before the next is asked for.

    queue        in order of arrival
    running      number of rows in the batch, by stream
    is_resident  returns whether a factor set is in the table
    is_full      returns whether the table has no room for another
    next_tenant  returns which of the tenants that have rows here is next; None ends it
    """
    # A row's turn comes when its request has so many rows in the batch.
    turns, of_stream = list[int](), Counter(running)
    for row in queue:
        turns.append(of_stream[row.stream])
        of_stream[row.stream] += 1
    lines: dict[Hashable, deque[W]] = {}
    for _, row in sorted(zip(turns, queue, strict=True), key=itemgetter(0)):
        lines.setdefault(row.tenant, deque()).append(row)
    passed, overtakes_left = list[W](), MAX_OVERTAKES
    while (tenant := next_tenant(lines)) is not None:
        row = lines[tenant].popleft()
        if not lines[tenant]:
            del lines[tenant]
        if is_full() and not is_resident(row.key):
            passed.append(row)
            overtakes_left = min(overtakes_left, MAX_OVERTAKES - row.overtaken)
        else:
            for overtaken in passed:
                overtaken.overtaken += 1
            overtakes_left -= bool(passed)
            yield row
        if overtakes_left <= 0:
            return


def short_chunk(prefill_tokens: int) -> int:
    """Return the most tokens of a chunk while another tenant, which has fewer rows, waits for its prompt to be read."""
    return max(prefill_tokens // 4, MIN_PREFILL_TOKENS)


def chunk_length(remaining: int, prefill_tokens: int) -> int:
    """Return how many tokens of a prompt to prefill next, at most prefill_tokens.

    A single token is never left for the last chunk: the decoder would run it as a step, which rounds differently in
    int8.
    """
    return prefill_tokens - 1 if remaining == prefill_tokens + 1 else min(remaining, prefill_tokens)


def joined(lengths: Iterable[int], prefill_tokens: int) -> int:
    """Return how many of the first prompts to prefill in one call, at least 1 if there is one.

    The call pads them to the longest: to prefill_tokens in all, and by no more than the calls that it saves are worth.
    Prompts of less than two tokens are alone: the decoder would run one token as a step, which rounds differently in
    int8.

    lengths  of whole prompts, of which no more are read than it takes
    """
    count = longest = tokens = 0
    shortest = math.inf
    for length in lengths:
        shortest, longest, tokens = min(shortest, length), max(longest, length), tokens + length
        padded = (count + 1) * longest
        if count and (shortest < 2 or padded > prefill_tokens or padded - tokens > count * CALL_TOKENS):
            return count
        count += 1
    return count

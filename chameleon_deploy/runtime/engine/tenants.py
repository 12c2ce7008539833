"""How tenants share an engine: rows by weight, calls that read prompts in turns, and the limits of each."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, fields

from chameleon_deploy.errors import QueueFullError, RateLimitError
from chameleon_deploy.runtime.engine.iteration import FinishedRow
from chameleon_deploy.runtime.inputs import check_integer

QUANTUM = 16  # tokens that a weight of 1 is worth in a round
SHORT_CALLS = 32  # that read prompts after a tenant has waited for its own
MAX_WEIGHT = 1000
MAX_LIMIT = 2**40


@dataclass(frozen=True)
class Tenant:
    """Whose rows a submit has, and what the tenant may take of an engine.

    name               of a tenant, whose submits all have the same weight and limits; those without are one tenant
    weight             of its share, 1 to 1,000: while several tenants wait, rows go to them by weight
    rows               of it in the batch at a time, at most
    max_waiting        rows of it that may wait, at most
    tokens_per_minute  that it may use, of prompts and new ones

    Raises InputError.
    """

    name: str = ""
    weight: int = 1
    rows: int | None = None
    max_waiting: int | None = None
    tokens_per_minute: int | None = None

    def __post_init__(self) -> None:
        limits = {"weight": (1, MAX_WEIGHT), "rows": (1, MAX_LIMIT), "max_waiting": (0, MAX_LIMIT),
                  "tokens_per_minute": (1, MAX_LIMIT)}  # fmt: skip
        for field in fields(self)[1:]:
            value = getattr(self, field.name)
            if value is not None or field.name == "weight":
                object.__setattr__(self, field.name, check_integer(field.name, value, *limits[field.name]))


NOBODY = Tenant()


class Shares:
    """Whose row is admitted next: deficit round robin over tokens, with debts. For one thread.

    A tenant's turn lasts while its deficit is positive. Rows cost the tokens of their prompts when they are admitted,
    and their new tokens as they come. What a tenant uses while no other waits costs nothing, and one that has left
    comes back without credit or debt.
    """

    def __init__(self) -> None:
        self._deficits: dict[str, int] = {}  # of the tenants in the engine, beginning with the one whose turn it is

    def keep(self, names: Collection[str]) -> None:
        """Take up tenants that have come to the engine, and forget those that have left."""
        self._deficits = {name: deficit for name, deficit in self._deficits.items() if name in names}
        for name in names:
            self._deficits.setdefault(name, 0)

    def turn(self, tenants: Collection[Tenant], waiting: Collection[Tenant]) -> Tenant:
        """Return whose turn it is of some of the tenants that wait; at least one. Rounds are for all that wait."""
        by_name = {tenant.name: tenant for tenant in tenants}
        ring = [name for name in self._deficits if name in by_name]
        if all(self._deficits[name] <= 0 for name in ring):
            rounds = min(-self._deficits[name] // (QUANTUM * by_name[name].weight) + 1 for name in ring)
            for tenant in waiting:
                self._deficits[tenant.name] += rounds * QUANTUM * tenant.weight
        first = next(name for name in ring if self._deficits[name] > 0)
        before = list(self._deficits)
        place = before.index(first)
        self._deficits = {name: self._deficits[name] for name in before[place:] + before[:place]}
        return by_name[first]

    def charge(self, tenant: Tenant, tokens: int, waiting: Collection[str]) -> None:
        """Count tokens of a tenant while the tenants of some names wait."""
        if tenant.name in self._deficits and any(name != tenant.name for name in waiting):
            self._deficits[tenant.name] -= tokens


def may_begin(tenant: Tenant, running: int, free: int, places: int) -> bool:
    """Return whether a tenant that is within its limit of rows may have another row in the batch now.

    The last place is kept for a tenant that has none, so that nobody with a name takes all.

    running  rows of it in the batch
    free     places of the batch that are free, of all `places`
    """
    return free > 1 or places == 1 or not tenant.name or not running


class Crowding:
    """Who reads short chunks: tenants with more rows for their weight than one that waits for its prompt to be read.

    Chunks stay short for some calls after that, since a tenant that asks one thing after another comes back while a
    chunk is read. For one thread.
    """

    def __init__(self) -> None:
        self._calls: dict[Tenant, int] = {}  # that are left to those that waited, in which chunks are short

    def names(self, present: Iterable[Tenant], unread: Iterable[Tenant]) -> set[str]:
        """Return the names of the tenants whose chunk is short in the next call that reads prompts.

        present  the tenant of each row that waits or is in the batch
        unread   the tenants of rows whose prompts are not read
        """
        left = {tenant: calls - 1 for tenant, calls in self._calls.items() if calls > 1}
        self._calls = left | dict.fromkeys(unread, SHORT_CALLS)
        if len(self._calls) == 1:
            return set()
        rows = Counter(present)
        # Who is away will have a row.
        least = min(max(rows[tenant], 1) / tenant.weight for tenant in self._calls)
        return {tenant.name for tenant, count in rows.items() if count / tenant.weight > least}


@dataclass
class Account:
    """What a tenant has in the engine, and what is left of its tokens.

    rows    that have not ended
    tokens  left at the time `at`; less than 0 where it has used more
    """

    rows: int
    tokens: float
    at: float


class Accounts:
    """Holds every tenant to its limits. The caller holds a lock.

    A tenant may begin while it has a token left, since nobody knows how many a request will take: what it uses beyond,
    it has to wait for. Tokens come back evenly, those of a minute at most.
    """

    def __init__(self, rows: int, max_waiting: int, clock: Callable[[], float] = time.monotonic) -> None:
        """Take the limits of the engine."""
        self._rows, self._max_waiting, self._clock = rows, max_waiting, clock
        self._accounts: dict[str, Account] = {}
        self._limits: dict[str, int] = {}  # tokens per minute

    def begin(self, tenant: Tenant, rows: int, prompt_tokens: int) -> None:
        """Take the rows of a submit. Raises QueueFullError or RateLimitError."""
        now, limit = self._clock(), tenant.tokens_per_minute
        account = self._accounts.get(tenant.name) or Account(0, limit or 0, now)
        self._check_rows(tenant, account.rows + rows, rows)
        if limit is not None:
            account.tokens = min(limit, account.tokens + (now - account.at) * limit / 60)
            if account.tokens < 1:
                seconds = math.ceil((1 - account.tokens) * 60 / limit)
                message = f"tenant {tenant.name!r} has used its {limit:,} tokens per minute: try again in {seconds} s"
                raise RateLimitError(message, retry_seconds=seconds)
            account.tokens -= prompt_tokens
            self._limits[tenant.name] = limit
        account.at, account.rows = now, account.rows + rows
        self._accounts[tenant.name] = account
        self._forget(now)

    def end(self, row: FinishedRow) -> None:
        """Give back the place of a row that has ended, and count its new tokens."""
        account = self._accounts[row.tenant]
        account.rows -= 1
        account.tokens -= row.new_tokens

    def _check_rows(self, tenant: Tenant, present: int, rows: int) -> None:
        if tenant.max_waiting is not None:
            running = self._rows if tenant.rows is None else min(tenant.rows, self._rows)
            if present > running + tenant.max_waiting:
                raise QueueFullError(f"no room for {rows} rows of tenant {tenant.name!r}: try again later")
        if tenant.name:
            others = sum(account.rows for name, account in self._accounts.items() if name != tenant.name)
            places = self._rows + self._max_waiting - others
            if present > max(places // 2, 1):
                raise QueueFullError(f"tenant {tenant.name!r} has half of the queue that others leave: try again later")

    def _forget(self, now: float) -> None:
        """Forget the accounts of tenants that are as if they had never come."""
        for name, account in list(self._accounts.items()):
            limit = self._limits.get(name)
            if not account.rows and (limit is None or account.tokens + (now - account.at) * limit / 60 >= limit):
                del self._accounts[name]
                self._limits.pop(name, None)

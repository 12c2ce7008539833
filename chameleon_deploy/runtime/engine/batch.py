"""The rows that are being generated, and their state in the decoder."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Sequence
from typing import Protocol

from chameleon_deploy.runtime.decode.logits import HostLogits, Logits
from chameleon_deploy.runtime.decode.prefix_cache import PrefixCache
from chameleon_deploy.runtime.decode.schedule import Schedule, chunk_length, joined, short_chunk
from chameleon_deploy.runtime.decode.slots import Slots
from chameleon_deploy.runtime.engine.factor_table import FactorTable
from chameleon_deploy.runtime.engine.member import Member, Prompt
from chameleon_deploy.runtime.engine.prefixes import Prefixes
from chameleon_deploy.runtime.factors import RowFactors

# Copying the cached tokens of a sibling takes less than an eighth of the time of a prefill.
FORKED_PER_PREFILL = 8


class Batch(Protocol):
    """The rows in the decoder.

    members        rows in the batch; rows with a finished prefill come first
    ready          number of rows with a finished prefill
    cached_tokens  tokens in the cache
    """

    members: list[Member]

    @property
    def ready(self) -> int: ...

    @property
    def cached_tokens(self) -> int: ...

    def room(self) -> int:
        """Return how many members may be admitted now."""

    def admit(self, member: Member) -> None:
        """Admit a member whose factor set is in the table already."""

    def drop(self, gone: Collection[Member]) -> None: ...

    def prefill(self, crowding: Collection[str] = ()) -> int:
        """Prefill one chunk of a prompt, or several whole prompts that are no longer. Returns the number of tokens.

        crowding  names of tenants whose chunks are short

        An exception of the decoder concerns those of `to_prefill` only.
        """

    def to_prefill(self) -> list[Member]:
        """Return the members whose prompts the next call of the decoder prefills."""

    def to_step(self) -> list[Member]:
        """Return members[:n], the input of the decoder's next step, without those that have logits already."""

    def draft(self) -> list[int]:
        """Return tokens that may follow in a step that is worth one: of a single row."""

    def step(self, draft: Sequence[int] = ()) -> Logits:
        """Return logits [ready, vocab] of the next token of each ready member; with a draft of the only one those after
        each of its tokens too, [1 + draft, vocab].

        An exception of the decoder concerns those of `to_step` only.
        """

    def cut(self) -> None:
        """Forget the tokens of a draft that the only ready member was not given."""


class ContinuousBatch:
    """A batch whose members join and leave at any time. See `Batch`.

    Where a step is as exact and follows every call that prefills, the last token of a prompt is left to the step, which
    reads the head's weights for all members in any case: several percent of the time of a prompt. Elsewhere the first
    new token follows from the last chunk.

    Tenants that have prompts to read take turns, call by call.
    """

    def __init__(self, slots: Slots, table: FactorTable, schedule: Schedule, cache: PrefixCache | None = None) -> None:
        """cache: of this batch alone; None keeps nothing"""
        self._slots, self._table, self._schedule = slots, table, schedule
        self.members: list[Member] = []
        self.ready = 0
        self._left_to_step = int(slots.is_exact and not schedule.reads_all)
        self._prefixes = None if cache is None else Prefixes(cache, slots, table, schedule.prefill_tokens)
        self._reading: list[Member] = []  # in the last call that prefilled
        self._admitted = self._calls = 0
        self._has_tenants = False  # several, since the batch was empty last
        self._read_at: dict[str, int] = {}  # the last call of each tenant in the batch
        self._stepped: tuple[list[Member], RowFactors] | None = None  # of the last step

    @property
    def cached_tokens(self) -> int:
        return int(self._slots.lengths[: len(self.members)].sum())

    def room(self) -> int:
        return len(self._slots.lengths) - len(self.members)

    def admit(self, member: Member) -> None:
        self._slots.admit(len(self.members))
        others = bool(self.members) and self.members[0].tenant.name != member.tenant.name
        self._has_tenants = others or (self._has_tenants and bool(self.members))
        member.place = self._admitted
        self._admitted += 1
        self.members.append(member)

    def drop(self, gone: Collection[Member]) -> None:
        for place in reversed(range(len(self.members))):
            if self.members[place] in gone:
                if self._prefixes is not None:
                    self._prefixes.keep(self.members[place], place)
                self._drop(place)

    def _drop(self, place: int) -> None:
        if place < self.ready:  # the last ready member moves into the gap and leaves one itself
            self.members[place].prompt.readers -= 1
            self.ready -= 1
            self._move(self.ready, place)
            place = self.ready
        for follower in range(place + 1, len(self.members)):  # in order; all but the first have no prefilled token yet
            self._move(follower, follower - 1)
        self.members.pop()

    def _move(self, source: int, target: int) -> None:
        if source != target:
            self._slots.move(source, target)
            self.members[target] = self.members[source]

    def prefill(self, crowding: Collection[str] = ()) -> int:
        tokens = self._prefill_once(crowding)
        while self._schedule.reads_all and self.ready < len(self.members):
            tokens += self._prefill_once(crowding)
        return tokens

    def _prefill_once(self, crowding: Collection[str]) -> int:
        forked = tokens = 0
        while self.ready < len(self.members):
            if self._has_tenants and not tokens:
                self._bring_next()
            prompt, start = self.members[self.ready].prompt, int(self._slots.lengths[self.ready])
            stop = self._prefilled(prompt)
            sibling = self._sibling(prompt) if start == 0 else None
            self._reading = [self.members[self.ready]]
            if start == stop:
                if self._prefixes is not None:
                    self._prefixes.keep(self.members[self.ready], self.ready)
                self.ready += 1
                prompt.readers += 1
            elif sibling is not None and forked < self._schedule.prefill_tokens * FORKED_PER_PREFILL:
                self._slots.fork(sibling, self.ready, stop)
                forked += stop
            elif sibling is None and start == 0 and self._restored():
                continue
            elif sibling is None and not tokens:
                tokens = self._prefill_chunks(start, crowding)
            else:
                break
        return tokens

    def _bring_next(self) -> None:
        """Bring a member of the tenant whose turn it is to the place that is read next."""
        names = dict.fromkeys(member.tenant.name for member in self.members[self.ready :])
        turn = min(names, key=lambda name: self._read_at.get(name, -1))
        mine = [place for place in range(self.ready, len(self.members)) if self.members[place].tenant.name == turn]
        # The one that is begun, so that there is one of each tenant at most.
        place = min(mine, key=lambda place: (not self._slots.lengths[place], self.members[place].place))
        if place != self.ready:
            self._slots.swap(self.ready, place)
            members = self.members
            members[self.ready], members[place] = members[place], members[self.ready]

    def _restored(self) -> bool:
        """Return whether the next prompt now begins with what the prefix cache has of it."""
        return self._prefixes is not None and self._prefixes.restore(self.members[self.ready], self.ready)

    def _prefilled(self, prompt: Prompt) -> int:
        """Return how many tokens of a prompt the prefill reads."""
        return len(prompt.ids) - self._left_to_step

    def _end_of_part(self, prompt: Prompt, start: int) -> int:
        """Return the end of the tokens that are read with the same factors as the token `start`."""
        return prompt.start if start < prompt.start else self._prefilled(prompt)

    def _sibling(self, prompt: Prompt) -> int | None:
        """Return a member with the same, already prefilled prompt."""
        if not prompt.readers:
            return None
        return next(i for i in reversed(range(self.ready)) if self.members[i].prompt is prompt)

    def to_prefill(self) -> list[Member]:
        return self._reading

    def _next_to_prefill(self) -> list[Member]:
        # The decoder appends tokens to a cache that is not empty for a single row only.
        if self._slots.lengths[self.ready]:
            return [self.members[self.ready]]
        most = self._schedule.prefill_tokens
        if self._has_tenants and len({member.tenant.name for member in self.members[self.ready :]}) > 1:
            most = short_chunk(most)  # nobody waits long for what others read in the same call
        count = joined(map(self._prefilled, self._unread()), most)
        return self.members[self.ready : self.ready + count]

    def _unread(self) -> Iterator[Prompt]:
        """Yield the next prompts up to the first that is copied later, from a member or from the prefix cache.

        A prompt whose update begins later is read in two parts, so it is alone.
        """
        seen, beginnings = set[int](), set[Hashable]()
        for place in range(self.ready, len(self.members)):
            member = self.members[place]
            prompt = member.prompt
            if prompt.readers or id(prompt) in seen or self._slots.lengths[place] or (seen and prompt.start):
                return
            if self._prefixes is not None:
                if seen and self._prefixes.will_have(member, beginnings):
                    return
                beginnings.add(self._prefixes.beginning(member))
            seen.add(id(prompt))
            yield prompt
            if prompt.start:
                return

    def _prefill_chunks(self, start: int, crowding: Collection[str]) -> int:
        """Prefill the next tokens of members that all have `start` tokens already."""
        members = self._reading = self._next_to_prefill()
        most = self._schedule.prefill_tokens
        if members[0].tenant.name in crowding:
            most = short_chunk(most)
        if self._prefixes is not None and start == 0:
            for member in members:
                self._prefixes.begin(member, cached=0, exact=0)
        ends = [self._end_of_part(member.prompt, start) for member in members]
        stops = [start + chunk_length(end - start, most) for end in ends]
        chunks = [member.prompt.ids[start:stop] for member, stop in zip(members, stops, strict=True)]
        num_logits = int(stops[0] == len(members[0].prompt.ids))
        factors = (
            self._table.of_rows([member.key for member in members])
            if len(members) > 1
            else self._table.set_of(members[0].key_at(start))
        )
        logits = self._slots.prefill(self.ready, chunks, factors, num_logits)
        if num_logits:
            for member, after_last in zip(members, logits[:, 0], strict=True):
                member.prompt.logits = after_last
        if start == members[0].prompt.exact and list(map(len, chunks)) == [self._schedule.prefill_tokens]:
            members[0].prompt.exact = stops[0]
        self._calls += 1
        present = self.members if self._has_tenants else []
        self._read_at = {m.tenant.name: self._read_at.get(m.tenant.name, -1) for m in present}
        self._read_at |= {m.tenant.name: self._calls for m in members}
        return sum(map(len, chunks))

    def to_step(self) -> list[Member]:
        return [member for member in self.members[: self.ready] if self._left_to_step or member.row.token_ids]

    def _factors_of(self, members: list[Member]) -> RowFactors:
        """Return the factors of members, the same object while neither they nor the table change."""
        if self._stepped is None or self._stepped[1].sets is not self._table.sets or self._stepped[0] != members:
            self._stepped = members, self._table.of_rows([member.key for member in members])
        return self._stepped[1]

    def draft(self) -> list[int]:
        return self.members[0].draft() if self.ready == 1 and self.members[0].row.token_ids else []

    def cut(self) -> None:
        row = self.members[0].row
        self._slots.cut(0, len(row.prompt) + len(row.token_ids) - 1)

    def step(self, draft: Sequence[int] = ()) -> Logits:
        stepped, logits = self.to_step(), self._slots.logits[: self.ready]
        if draft:
            read = [stepped[0].row.token_ids[-1], *draft]
            return HostLogits(self._slots.draft(0, read, self._table.set_of(stepped[0].key)))
        if stepped:
            last = [(member.row.token_ids or member.prompt.ids)[-1] for member in stepped]
            self._slots.step(last, self._factors_of(stepped))
        for place in range(len(stepped), self.ready):
            logits[place] = self.members[place].prompt.logits
        return HostLogits(logits)

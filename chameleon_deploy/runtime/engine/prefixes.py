"""What the rows of a batch take from the prefix cache, and what they give to it."""

from __future__ import annotations

from collections.abc import Collection, Hashable
from functools import partial

from chameleon_deploy.runtime.decode.bound_call import Array
from chameleon_deploy.runtime.decode.prefix_cache import BLOCK_TOKENS, Block, PrefixCache, Root
from chameleon_deploy.runtime.decode.schedule import CALL_TOKENS
from chameleon_deploy.runtime.decode.slots import Slots
from chameleon_deploy.runtime.engine.factor_table import NO_UPDATE, FactorTable
from chameleon_deploy.runtime.engine.member import Member


class Prefixes:
    """Copies keys and values between the slots of a batch and the prefix cache. For the batch's thread.

    What a prompt begins with is copied when its turn to be read comes: by then other rows have read what they share.
    """

    def __init__(self, cache: PrefixCache, slots: Slots, table: FactorTable, prefill_tokens: int) -> None:
        self._cache, self._slots, self._table, self._prefill_tokens = cache, slots, table, prefill_tokens
        # Where a step follows that reads a prompt's last token, the rest may all be found. Elsewhere a chunk must be
        # read, of two tokens at least, see `chunk_length`.
        self._left = 1 if slots.is_exact else 2

    def restore(self, member: Member, place: int) -> bool:
        """Begin a member's row with what there is of its prompt. False if that is nothing."""
        if not (blocks := self._find(member, is_used=True)):
            return False
        for block in blocks:
            self._slots.copy_in(place, self._cache.memory_of(block))
        length = BLOCK_TOKENS * len(blocks)
        is_exact = length % self._prefill_tokens == 0 and all(block.is_exact for block in blocks)
        self.begin(member, length, length if is_exact else 0)
        return True

    def begin(self, member: Member, cached: int, exact: int) -> None:
        """Note how many tokens of a member's prompt were found when it began, and how many of them are exact."""
        prompt = member.prompt
        prompt.exact = exact
        if not prompt.begun:  # a later continuation may find what the first has left
            prompt.begun = True
            self._cache.count(len(prompt.ids), cached)
            member.stream.cached_tokens[member.row.index // member.stream.n] = cached

    def keep(self, member: Member, place: int) -> None:
        """Offer the keys and values of a member's row."""
        ids, length = member.prompt.ids, int(self._slots.lengths[place])
        if not length:
            return
        if not member.cache_generated:
            length = min(length, len(ids) - 1)  # the last token may be read by a step
        text = [*ids, *member.row.token_ids][:length]
        for root, part in self._parts(member):
            first = part.start
            self._cache.offer(root, text[part], member.prompt.exact - first, partial(self._copy_out, place, first))

    def _copy_out(self, place: int, first: int, start: int, block: Array) -> None:
        self._slots.copy_out(place, first + start, block)

    def will_have(self, member: Member, beginnings: Collection[Hashable]) -> bool:
        """Return whether a member's prompt begins with what is here, or with what one of these beginnings will be."""
        return bool(self._find(member, is_used=False)) or (
            member.cache_generated and len(member.prompt.ids) > CALL_TOKENS and self.beginning(member) in beginnings
        )

    def beginning(self, member: Member) -> Hashable:
        """Return a key that is equal for prompts that begin with equal keys and values."""
        root = next(root for root, part in reversed(self._parts(member)) if part.start < CALL_TOKENS)
        return root.digest, tuple(member.prompt.ids[:CALL_TOKENS])

    def _parts(self, member: Member) -> list[tuple[Root, slice]]:
        """Return the roots of a member's text, and which of its tokens are found after each.

        Where an update begins later, the whole blocks before it are the base model's, for every adapter. What comes
        then depends on them and on where the update begins, too.
        """
        salt, start = member.cache_salt, member.prompt.start
        digest = self._table.trunk_digest(member.key)
        if not start:
            return [(self._cache.root(digest, salt), slice(0, None))]
        first = start // BLOCK_TOKENS * BLOCK_TOKENS
        base = self._cache.root(self._table.trunk_digest(NO_UPDATE), salt)
        updated = self._cache.root(digest, salt, start, member.prompt.ids[:first])
        return [(base, slice(0, first)), (updated, slice(first, None))]

    def _find(self, member: Member, is_used: bool) -> list[Block]:
        """Return the blocks that a member's prompt is to begin with."""
        ids, chunk, start = member.prompt.ids, self._prefill_tokens, member.prompt.start
        blocks = list[Block]()
        for root, part in self._parts(member):
            if len(blocks) * BLOCK_TOKENS == part.start:
                blocks += self._cache.find(root, ids[: len(ids) - self._left][part], is_used)
        if not member.cache_generated:
            exact = next((i for i, block in enumerate(blocks) if not block.is_exact), len(blocks)) * BLOCK_TOKENS
            # Up to where a run that finds nothing ends a chunk, too: before two tokens it cuts otherwise.
            read = len(ids) - 1 if self._left == 1 else len(ids)
            ends = [
                end
                for end in range(chunk, exact + 1, chunk)
                if end % BLOCK_TOKENS == 0 and (start if end < start else read) - end != 1
            ]
            blocks = blocks[: max(ends, default=0) // BLOCK_TOKENS]
        # Less saves no more than a call costs, and short prompts can be read together.
        return blocks if len(blocks) * BLOCK_TOKENS >= CALL_TOKENS else []

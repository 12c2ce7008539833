"""Keys and values that later prompts may begin with, in host memory outside the slots.

Keys and values depend on the bundle, on the values of the factors that reach the trunk, on the tokens from the first,
on which of them the factors update, and on nothing else. So that is what finds them, beside a salt; names of adapters
are no part of it. Tokens are compared themselves, block by block, so that no collision of digests can confuse two
texts.

A block is exact if it was read as part of a whole chunk that began at a multiple of the chunk's length, after exact
ones: the same call with the same inputs as in a run that finds nothing, so the same bits. What steps, drafts and other
chunks wrote differs from that in the order of sums, and in int8 in rounding.
"""

from __future__ import annotations

import hashlib
import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from chameleon_deploy.errors import InputError
from chameleon_deploy.runtime.decode.bound_call import Array

BLOCK_TOKENS = 16
_KEY_BYTES = BLOCK_TOKENS * array("i").itemsize


@dataclass(eq=False)
class Root:
    """The beginning of all texts that may share keys and values.

    salt    of their requests
    blocks  number of blocks after it, however far
    """

    digest: bytes
    salt: str
    blocks: int = 0
    children: dict[bytes, Block] = field(default_factory=dict)


@dataclass(eq=False)
class Block:
    """The keys and values of BLOCK_TOKENS tokens.

    tokens    its token ids, int32
    place     in the cache's memory
    is_exact  see the module
    """

    root: Root
    parent: Root | Block
    tokens: bytes
    place: int
    is_exact: bool
    children: dict[bytes, Block] = field(default_factory=dict)


@dataclass(frozen=True)
class PrefixCacheStats:
    """The state of a prefix cache.

    tokens     whose keys and values are cached
    bytes      that these take, of max_bytes
    queries    prompt tokens that were looked for since the start
    hits       those of them that were found and used
    evictions  tokens that had to make room for others
    """

    tokens: int = 0
    bytes: int = 0
    max_bytes: int = 0
    queries: int = 0
    hits: int = 0
    evictions: int = 0


class PrefixCache:
    """Blocks of keys and values, found by what they depend on; the least recently used leave first.

    One thread, the engine's, calls `find`, `memory_of` and `offer`; a block that it found holds its values until it
    offers others. Any thread may call `stats` and `clear`.
    """

    def __init__(self, bundle_digest: str, token_shape: tuple[int, int, int], dtype: npt.DTypeLike, max_bytes: int):
        """Take the memory, which becomes resident only where it is written.

        bundle_digest  SHA-256 in hexadecimal digits
        token_shape    layers * 2, key-value heads, head_dim

        Raises InputError if there is not enough address space.
        """
        layers, heads, head_dim = token_shape
        shape = (layers, heads, BLOCK_TOKENS, head_dim)
        self.block_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        self.max_blocks = max_bytes // self.block_bytes
        try:
            self._memory = np.empty((self.max_blocks, *shape), dtype)
        except (MemoryError, ValueError) as error:
            message = f"no memory for a prefix cache of {max_bytes:,} bytes: pass fewer"
            raise InputError(message, "prefix_cache_bytes") from error
        self._bundle_digest = bytes.fromhex(bundle_digest)
        self._roots: dict[bytes, Root] = {}
        # Least recently used first. Whoever uses a block uses those before it too, later: so a block comes before its
        # parent here, and the first has no children.
        self._by_age: OrderedDict[Block, None] = OrderedDict()
        self._free: list[int] = []  # places that blocks have left
        self._used = 0  # places that ever held a block
        self._queries = self._hits = self._evictions = 0
        self._lock = threading.Lock()

    def root(self, factors_digest: bytes, salt: str, start: int = 0, before: Sequence[int] = ()) -> Root:
        """Return the root of texts that are read with these factors.

        factors_digest  SHA-256 of the values of the factors that reach the trunk
        start, before   of an update that begins later: the first token that it updates, and the tokens before the root
        """
        parts = self._bundle_digest, factors_digest, hashlib.sha256(salt.encode()).digest()
        named = b"bundle%bfactors%bsalt%b" % parts
        if start:
            named += b"start%bbefore%b" % (start.to_bytes(8, "little"), hashlib.sha256(array("i", before)).digest())
        digest = hashlib.sha256(named).digest()
        return self._roots.get(digest) or Root(digest, salt)

    def find(self, root: Root, ids: Sequence[int], is_used: bool = True) -> list[Block]:
        """Return the blocks that a text begins with. is_used: whether they are as recently used as can be now"""
        with self._lock:
            blocks = self._walk(root, array("i", ids).tobytes())
            if is_used:
                self._use(blocks)
        return blocks

    def memory_of(self, block: Block) -> Array:
        """Return the keys and values of a block, [layers * 2, heads, BLOCK_TOKENS, head_dim]."""
        memory: Array = self._memory[block.place]
        return memory

    def count(self, queries: int, hits: int) -> None:
        """Count tokens of a prompt, and those that were found."""
        self._queries += queries
        self._hits += hits

    def offer(self, root: Root, ids: Sequence[int], exact: int, copy_out: Callable[[int, Array], None]) -> None:
        """Keep the whole blocks of a text, as far as there is room, and those of them that are exact instead of others.

        exact     how many tokens at the beginning are exact; 0 or less is none
        copy_out  copies the keys and values from a token on into a block's memory
        """
        keys = array("i", ids).tobytes()
        wanted, exact_blocks = len(ids) // BLOCK_TOKENS, max(exact, 0) // BLOCK_TOKENS
        with self._lock:
            blocks = self._walk(root, keys)
            for i, block in enumerate(blocks[:exact_blocks]):
                if not block.is_exact:
                    copy_out(i * BLOCK_TOKENS, self.memory_of(block))
                    block.is_exact = True
            self._use(blocks)
            if len(blocks) == wanted:
                return
            self._make_room(wanted - len(blocks), blocks)
            for i in range(len(blocks), wanted):
                if (place := self._take_place()) is None:
                    break
                parent = blocks[-1] if blocks else self._roots.setdefault(root.digest, root)
                tokens = keys[i * _KEY_BYTES : (i + 1) * _KEY_BYTES]
                block = parent.children[tokens] = Block(root, parent, tokens, place, i < exact_blocks)
                copy_out(i * BLOCK_TOKENS, self.memory_of(block))
                root.blocks += 1
                blocks.append(block)
            self._use(blocks)

    def stats(self, salt: str = "") -> PrefixCacheStats:
        """Return the state, with the tokens and bytes of salts that begin with `salt`."""
        with self._lock:
            blocks = sum(root.blocks for root in self._roots.values() if root.salt.startswith(salt))
        limit = self.max_blocks * self.block_bytes
        held = blocks * BLOCK_TOKENS, blocks * self.block_bytes
        return PrefixCacheStats(*held, limit, self._queries, self._hits, self._evictions)

    def clear(self, salt: str = "") -> None:
        """Forget the blocks of salts that begin with `salt`."""
        with self._lock:
            for block in [block for block in self._by_age if block.root.salt.startswith(salt)]:
                self._remove(block)

    def _walk(self, root: Root, keys: bytes) -> list[Block]:
        blocks: list[Block] = []
        children = root.children
        for start in range(0, len(keys) - _KEY_BYTES + 1, _KEY_BYTES):
            block = children.get(keys[start : start + _KEY_BYTES])
            if block is None:
                break
            blocks.append(block)
            children = block.children
        return blocks

    def _use(self, blocks: Sequence[Block]) -> None:
        for block in reversed(blocks):
            self._by_age[block] = None
            self._by_age.move_to_end(block)

    def _make_room(self, wanted: int, used: Sequence[Block]) -> None:
        """Remove blocks for as many others, but none of the text that these continue, which was used last."""
        last = used[-1] if used else None
        while self.max_blocks - self._used + len(self._free) < wanted:
            oldest = next(iter(self._by_age), None)
            if oldest is last or oldest is None:
                return
            self._remove(oldest)
            self._evictions += BLOCK_TOKENS

    def _take_place(self) -> int | None:
        if self._free:
            return self._free.pop()
        if self._used == self.max_blocks:
            return None
        self._used += 1
        return self._used - 1

    def _remove(self, block: Block) -> None:
        del self._by_age[block], block.parent.children[block.tokens]
        self._free.append(block.place)
        block.root.blocks -= 1
        if not block.root.blocks:
            del self._roots[block.root.digest]

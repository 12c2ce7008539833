"""The prefix cache: a row has the keys and values that reading its own tokens with its own factors gives.

CHAMELEON_OPERATIONS=100000 makes as many random operations for each kind of bundle; a run of the suite makes a few.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Hashable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import chameleon_deploy
from chameleon_deploy import Adapt, Engine, Generate, Generation, Runtime, Sampling, Stream
from chameleon_deploy.contract.adapter_file import write_adapter
from chameleon_deploy.contract.manifest import in_head
from chameleon_deploy.errors import ChameleonError, InputError
from chameleon_deploy.export.exporter import export_bundle
from chameleon_deploy.reference.adapters import load_adapted
from chameleon_deploy.reference.checkpoint import load_checkpoint
from chameleon_deploy.reference.random import random_checkpoint
from chameleon_deploy.runtime.decode.prefix_cache import BLOCK_TOKENS, Block, PrefixCache, Root
from chameleon_deploy.runtime.decode.schedule import Schedule
from chameleon_deploy.runtime.decode.shared_cache import SharedCacheDecoder
from chameleon_deploy.runtime.decode.slots import Slots
from chameleon_deploy.runtime.engine.batch import ContinuousBatch
from chameleon_deploy.runtime.engine.factor_table import FactorTable
from chameleon_deploy.runtime.engine.iteration import Iteration
from chameleon_deploy.runtime.engine.loop import Loop, generate_rows
from chameleon_deploy.runtime.engine.member import Member, Prompt
from chameleon_deploy.runtime.engine.prefixes import Prefixes
from chameleon_deploy.runtime.engine.stream import deliver
from chameleon_deploy.runtime.engine.submission import form_cohort, prepare
from chameleon_deploy.runtime.factors import FactorSets, RowFactors, zero_set
from chameleon_deploy.runtime.generation import Row
from chameleon_deploy.runtime.sampling import Sampler

OPERATIONS = int(os.environ.get("CHAMELEON_OPERATIONS", "250"))
CAPACITY, CHUNK, SETS = 128, 16, 4
KINDS = ("fp32", "int8", "llama")
# How prompts are adapted: a mode, with +: of two prompts, or with the number of an adapter or of a caller's factors.
HOW = ("none", "none", "centroid", "request", "cohort+", "tenant+", "static 0", "static 1", "adapter 0", "adapter 1")
INVOCATION = 7  # of some adapters
GREEDY = Sampling(ignore_eos=True, logprobs=2)

pytestmark = pytest.mark.timeout(max(600, OPERATIONS // 5))


@pytest.fixture(scope="module")
def bundles(llama_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models whose every layer is updated: a GPT-2 with a hypernetwork in fp32 and int8, and a Llama that takes
    adapters.
    """
    path = tmp_path_factory.mktemp("prefixes")
    random_checkpoint(path / "checkpoint", "mini", targets=["all"])
    checkpoint = load_checkpoint(path / "checkpoint")
    export_bundle(checkpoint, path / "fp32")
    export_bundle(checkpoint, path / "int8", precision="int8")
    export_bundle(load_adapted(str(llama_path / "base"), {}, adaptable=["all"], max_rank=2), path / "llama")
    return {kind: path / kind for kind in KINDS}


@pytest.fixture(scope="module", params=KINDS)
def updated(bundles: dict[str, Path], request: pytest.FixtureRequest) -> Runtime:
    return chameleon_deploy.load(bundles[request.param], threads=1)


@pytest.fixture(scope="module")
def plain(bundles: dict[str, Path]) -> Runtime:
    return chameleon_deploy.load(bundles["llama"], threads=1)


def random_factors(runtime: Runtime, seed: int) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    widths = runtime.manifest.adaptation.factor_widths
    return {name: random.normal(0, 0.2, (2, width)).astype(np.float32) for name, width in widths.items()}


class Cold:
    """What a run gives that finds nothing, beside nobody."""

    def __init__(self, runtime: Runtime) -> None:
        assert isinstance(runtime.decoder, SharedCacheDecoder)
        self.runtime, self.slots = runtime, runtime.decoder.slots(1, CAPACITY)
        self.tolerance = 1e-5 if self.slots.is_exact else 0.02  # mean difference: of values, or of int8 steps

    def key_values(self, ids: Sequence[int], whole: int, sets: FactorSets, updated: int) -> Any:
        """Return [layers * 2, heads, tokens, head_dim]: so many tokens in whole chunks, the rest in one.

        updated  the first token that is updated
        """
        self.slots.admit(0)
        factors = RowFactors(sets, np.zeros(1, np.int64), np.array([updated]))
        for start, stop in pairwise(sorted({*range(0, whole, CHUNK), whole, min(updated, len(ids)), len(ids)})):
            if chunk := ids[start:stop]:
                self.slots.prefill(0, [chunk], factors.at([0], [start]))
        return self.slots._cache[:, 0, :, : len(ids)]

    def generation(self, member: Member) -> Generation:
        prompt = member.row.prompt
        row = Row(0, prompt, member.row.limit, Sampler(member.row.sampling, prompt, 0), 0, is_shown=False)
        factors = RowFactors(member.source.make(), np.zeros(1, np.int64), np.array([member.prompt.start]))
        tokenizer, eos = self.runtime.tokenizer, self.runtime.manifest.model.eos_token_id
        *_, last = generate_rows([row], factors, self.runtime.backend, tokenizer, eos)
        assert last.generation is not None
        return last.generation


class CheckedPrefixes(Prefixes):
    """Compares each row that is offered to the cache with a cold run."""

    def __init__(self, cold: Cold, cache: PrefixCache, slots: Slots, table: FactorTable) -> None:
        super().__init__(cache, slots, table, CHUNK)
        self.cold = cold
        self.offered = set[Hashable]()  # with what each depends on
        self.largest = 0.0

    def keep(self, member: Member, place: int) -> None:
        length = int(self._slots.lengths[place])
        ids = [*member.prompt.ids, *member.row.token_ids][:length]
        sets, exact = member.source.make(), member.prompt.exact
        found, expected = (
            self._slots._cache[:, place, :, :length],
            self.cold.key_values(ids, exact, sets, member.prompt.start),
        )
        is_same = found[:, :, :exact].tobytes() == expected[:, :, :exact].tobytes()
        assert is_same  # where CI is set, pytest would take minutes to list what differs
        difference = np.abs(found.astype(np.float32) - expected.astype(np.float32)).mean() if length else 0.0
        assert difference <= self.cold.tolerance, difference
        self.largest = max(self.largest, float(difference))
        self._check_hit(member, sets)
        super().keep(member, place)
        for end in range(BLOCK_TOKENS, length + 1, BLOCK_TOKENS):
            self.offered.add(_depends_on(member, sets, ids[:end]))

    def _check_hit(self, member: Member, sets: FactorSets) -> None:
        """Check that what was found had been offered with the same salt and factors."""
        hit = member.stream.cached_tokens[member.row.index // member.stream.n]
        assert hit == 0 or _depends_on(member, sets, member.prompt.ids[:hit]) in self.offered


def _depends_on(member: Member, sets: FactorSets, ids: Sequence[int]) -> Hashable:
    """Return what the keys and values of a member's first tokens depend on."""
    start = member.prompt.start
    which = (_values(zero_set(sets)), 0) if len(ids) <= start else (_values(sets), start)
    return member.cache_salt, which, tuple(ids)


def _values(sets: FactorSets) -> bytes:
    """Return a digest of the trunk's factors: of 100,000 operations, they would take gigabytes themselves."""
    arrays = [np.asarray(array).tobytes() for name, array in sorted(sets.tensors.items()) if not in_head(name)]
    return hashlib.sha256(b"".join(arrays)).digest()


class World:
    """An engine without its thread, whose cache is too small, and what random operations do to it."""

    def __init__(self, runtime: Runtime, seed: int, files: Path, blocks: int = 48, rows: int = 4) -> None:
        self.runtime, self.random, self.files = runtime, np.random.default_rng(seed), files
        self.cold, self.table = Cold(runtime), FactorTable(SETS)
        assert isinstance(runtime.decoder, SharedCacheDecoder)
        self.prefixes = runtime.decoder.prefix_cache(
            runtime.bundle.digest, blocks * BLOCK_TOKENS * runtime.decoder.token_bytes
        )
        slots = runtime.decoder.slots(rows, CAPACITY)
        self.batch = ContinuousBatch(slots, self.table, Schedule(CHUNK))
        self.batch._prefixes = self.checked = CheckedPrefixes(self.cold, self.prefixes, slots, self.table)
        self.loop = Loop(self.batch, self.table, runtime.tokenizer, runtime.manifest.model.eos_token_id)
        self.texts: list[tuple[list[int], str, str]] = [([], "none", "")]  # with how they were read, and the salt
        self.kinds: dict[Stream, tuple[str, str]] = {}
        self.running: list[tuple[Stream, list[Member]]] = []
        self.hits = self.finished = 0
        self.modes = runtime.manifest.adaptation.modes
        for name in list(runtime.adapters.names):
            runtime.unload_adapter(name)

    def submit(self, *prompts: list[int], adapt: Adapt | None = None, **generate: Any) -> Stream:
        fields: dict[str, Any] = {"max_new_tokens": 1, "sampling": GREEDY}
        options = Generate(**fields | generate)
        submission = prepare(self.runtime, prompts, options, adapt or Adapt("none"), CAPACITY)
        form_cohort(self.runtime, [submission], 0)
        self.loop.waiting.extend(submission.members)
        self.running.append((submission.stream, submission.members))
        return submission.stream

    def iterate(self) -> Iteration:
        tokens, iteration = self.loop.iterate()
        deliver(tokens)
        for stream, members in [entry for entry in self.running if entry[0].done]:
            self.running.remove((stream, members))
            self.hits += sum(stream.cached_tokens)
            for member, generation in zip(members, stream.result(0), strict=True):
                self.check(member, generation)
                self.texts.append(([*member.prompt.ids, *generation.token_ids], *self.kinds.get(stream, ("none", ""))))
            self.kinds.pop(stream, None)
        del self.texts[:-12]
        return iteration

    def run(self) -> list[Iteration]:
        iterations = []
        while self.loop:
            iterations.append(self.iterate())
        return iterations

    def check(self, member: Member, found: Generation) -> None:
        """Compare greedy tokens with a cold run's, up to where its two best are close."""
        assert found.finish_reason in ("length", "cancelled")
        if found.finish_reason == "cancelled" or member.row.sampling.temperature > 0:
            return
        self.finished += 1
        cold, closest = self.cold.generation(member), 1e-4 if self.cold.slots.is_exact else 0.05
        assert cold.top_logprobs is not None
        for place, token_id in enumerate(cold.token_ids):
            if found.token_ids[place] != token_id:
                (_, best), (_, second) = cold.top_logprobs[place][:2]
                assert best - second < closest, (place, found.token_ids, cold.token_ids)
                return

    def operate(self) -> None:
        choice = self.random.random()
        if choice < 0.45:
            self.random_submit()
        elif choice < 0.90:
            self.iterate()
        elif choice < 0.94 and self.running:
            self.running[self.random.integers(len(self.running))][0].cancel()
        elif choice < 0.98 and self.runtime.manifest.adaptation.base_digest:
            self.replace_adapter(f"adapter{self.random.integers(2)}")
        elif choice < 0.99:
            self.prefixes.clear(str(self.random.choice(["", "a", "b"])))
        while len(self.loop.waiting) > 12:
            self.iterate()

    def random_submit(self) -> None:
        """Submit the beginning of a text that was read or generated and new tokens, mostly as that text was."""
        random = self.random
        old, how, salt = self.texts[random.integers(len(self.texts))]
        if random.random() < 0.3:
            how = str(random.choice([how for how in HOW if how.split()[0].rstrip("+") in (*self.modes, "adapter")]))
            salt = str(random.choice(["", "a", "b"]))
        kept = old[: random.integers(len(old) + 1)] if random.random() < 0.3 else old
        prompts = [[*kept[:80], *random.integers(1, 512, random.integers(1, 40)).tolist()] for _ in how.split("+")]
        for prompt in prompts:
            if random.random() < 0.4:
                prompt[random.integers(min(len(kept), 80), len(prompt))] = INVOCATION
        hot = Sampling(temperature=1.0, seed=int(random.integers(99)), ignore_eos=True)
        stream = self.submit(
            *prompts,
            adapt=self.adapt(how),
            max_new_tokens=int(random.integers(1, 24)),
            sampling=GREEDY if random.random() < 0.7 else hot,
            n=int(random.choice([1, 1, 1, 3])),
            cache_salt=salt,
            cache_generated=bool(random.random() < 0.7),
            prompt_lookup_num_tokens=4 if self.cold.slots.is_exact and random.random() < 0.3 else 0,
        )
        self.kinds[stream] = how, salt

    def adapt(self, how: str) -> Adapt:
        kind, _, number = how.partition(" ")
        if kind == "adapter":
            name = f"adapter{number}"
            return Adapt(adapters=[name]) if name in self.runtime.adapters.names else Adapt("none")
        if kind == "static":
            return Adapt("static", factors=random_factors(self.runtime, int(number)))
        if kind == "tenant+":
            return Adapt("tenant", tenants=["a", "b"])
        return Adapt(kind.rstrip("+"))  # type: ignore[arg-type]

    def replace_adapter(self, name: str, seed: int | None = None) -> None:
        if name in self.runtime.adapters.names:
            self.runtime.unload_adapter(name)
        seed = int(self.random.integers(5)) if seed is None else seed
        file = self.files / f"{seed}.safetensors"
        if not file.exists():
            activated_by = [INVOCATION] if seed > 2 else []
            write_adapter(file, random_factors(self.runtime, seed), self.runtime.manifest.adaptation, activated_by)
        self.runtime.load_adapter(name, file)


def test_random_operations_equal_cold_runs(updated: Runtime, tmp_path: Path) -> None:
    world = World(updated, 7, tmp_path)
    for _ in range(OPERATIONS):
        world.operate()
    world.run()
    stats = world.prefixes.stats()
    assert world.hits > OPERATIONS
    assert stats.hits == world.hits
    assert stats.evictions > 0
    assert world.finished > OPERATIONS / 20
    check_structure(world.prefixes)
    print(f"{stats}, largest mean difference of a row's keys and values {world.checked.largest:.2g}")
    world.prefixes.clear()
    assert world.prefixes.stats().tokens == 0
    assert not world.prefixes._roots


def check_structure(prefixes: PrefixCache) -> None:
    """Every block is in its parent, older than it, and in a place of its own; its root counts it."""
    by_age = list(prefixes._by_age)
    ages = {block: age for age, block in enumerate(by_age)}
    assert len({block.place for block in by_age} | set(prefixes._free)) == len(by_age) + len(prefixes._free)
    assert len(by_age) + len(prefixes._free) == prefixes._used <= prefixes.max_blocks
    for block in by_age:
        assert block.parent.children[block.tokens] is block
        assert isinstance(block.parent, Root) or ages[block.parent] > ages[block]
    for root in prefixes._roots.values():
        assert root.blocks == sum(block.root is root for block in by_age)


def a_name_as_key(patch: pytest.MonkeyPatch) -> None:
    def name_of(key: Any) -> str:
        if isinstance(key, tuple):  # of an adapter, without the number that tells it from others of its name
            return str(key[0][0][0])
        return str(key) if isinstance(key, str | int | bytes) else "static"

    patch.setattr(FactorTable, "trunk_digest", lambda self, key: name_of(key).encode()[:32].ljust(32))


def a_missing_salt(patch: pytest.MonkeyPatch) -> None:
    root = PrefixCache.root
    patch.setattr(PrefixCache, "root", lambda self, digest, salt, *of_update: root(self, digest, "", *of_update))


def a_missing_place_of_the_update(patch: pytest.MonkeyPatch) -> None:
    root = PrefixCache.root
    patch.setattr(PrefixCache, "root", lambda self, digest, salt, *of_update: root(self, digest, salt))


def an_update_one_token_late(patch: pytest.MonkeyPatch) -> None:
    end_of_part = ContinuousBatch._end_of_part

    def late(self: ContinuousBatch, prompt: Prompt, start: int) -> int:
        is_last = 0 < prompt.start - start < CHUNK and prompt.start < self._prefilled(prompt)
        return end_of_part(self, prompt, start) + is_last

    patch.setattr(ContinuousBatch, "_end_of_part", late)


def an_off_by_one_of_a_block(patch: pytest.MonkeyPatch) -> None:
    copy_out = Slots.copy_out
    patch.setattr(Slots, "copy_out", lambda self, row, start, block: copy_out(self, row, start and start - 1, block))


def an_eviction_under_a_reader(patch: pytest.MonkeyPatch) -> None:
    find = PrefixCache.find

    def evicting(self: PrefixCache, root: Root, ids: Sequence[int], is_used: bool) -> list[Block]:
        blocks = find(self, root, ids, is_used)
        for block in blocks[-1:]:
            if not block.children:
                self.memory_of(block)[...] = 1  # as if another text had taken its place
        return blocks

    patch.setattr(PrefixCache, "find", evicting)


def a_factor_changed_after_admission(patch: pytest.MonkeyPatch) -> None:
    digest = FactorTable.trunk_digest

    def changed(self: FactorTable, key: Any) -> bytes:
        is_known, found = key in self._trunk_digests, digest(self, key)
        for name, tensor in self._tensors.items():
            if not is_known and not in_head(name):
                tensor[self.index(key)] += 0.1
        return found

    patch.setattr(FactorTable, "trunk_digest", changed)


def steps_taken_for_whole_chunks(patch: pytest.MonkeyPatch) -> None:
    offer = PrefixCache.offer
    patch.setattr(PrefixCache, "offer", lambda self, root, ids, exact, copy: offer(self, root, ids, len(ids), copy))


FAULTS: list[Callable[[pytest.MonkeyPatch], None]] = [
    a_name_as_key, a_missing_salt, an_update_one_token_late, an_off_by_one_of_a_block, an_eviction_under_a_reader,
    a_factor_changed_after_admission, steps_taken_for_whole_chunks,
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_faults_are_caught(
    plain: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Callable[[pytest.MonkeyPatch], None]
) -> None:
    """Which rows meet depends on the engine's thread as well as on the seed, so there are several."""
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        for seed in range(7, 17):
            directory = tmp_path / str(seed)
            directory.mkdir()
            world = World(plain, seed, directory)
            for _ in range(2000):
                world.operate()


def prompt_of(length: int, seed: int = 0) -> list[int]:
    found: list[int] = np.random.default_rng(seed).integers(1, 512, length).tolist()
    return found


def cached_after_beginnings(world: World) -> list[int]:
    """Return what is found for two texts that begin otherwise and go on alike, where an adapter is activated, and for
    both once more.
    """
    world.replace_adapter("late", seed=3)
    beginnings, rest = [[8] * BLOCK_TOKENS, [9] * BLOCK_TOKENS], [INVOCATION, *[10] * 40]
    for beginning in beginnings:  # the base model's part
        world.submit([*beginning, 11])
        world.run()
    cached = []
    for beginning in [*beginnings, *beginnings]:
        stream = world.submit([*beginning, *rest], adapt=Adapt(adapters=["late"]))
        world.run()
        cached += stream.cached_tokens
    return cached


def test_what_follows_an_invocation_depends_on_what_comes_before(
    plain: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cached_after_beginnings(World(plain, 0, tmp_path)) == [0, 0, 48, 48]
    a_missing_place_of_the_update(monkeypatch)
    with pytest.raises(AssertionError):
        cached_after_beginnings(World(plain, 0, tmp_path))


@pytest.fixture
def world(updated: Runtime, tmp_path: Path) -> World:
    return World(updated, 0, tmp_path, blocks=64)


@pytest.mark.parametrize("length", [48, 49, 50, 63, 64, 65, 66, 80, 97])
@pytest.mark.parametrize("mode", ["none", "request"])
def test_whole_chunks_give_the_bytes_of_a_cold_run(world: World, length: int, mode: Any) -> None:
    """Tokens and log-probabilities, for a prompt again and for one that goes on otherwise."""
    sampling = Sampling(temperature=1.0, seed=3, logprobs=5, ignore_eos=True)
    prompt = prompt_of(length)
    other = [*prompt[:48], *prompt_of(length - 48 or 1, seed=1)]

    def run(ids: list[int]) -> tuple[Generation, int]:
        adapt = Adapt("static", factors=random_factors(world.runtime, 1)) if mode == "request" else Adapt("none")
        stream = world.submit(ids, adapt=adapt, max_new_tokens=8, sampling=sampling, cache_generated=False)
        world.run()
        return stream.result(0)[0], stream.cached_tokens[0]

    cold = {}
    for ids in (prompt, other):
        world.prefixes.clear()
        generation, cached = run(ids)
        assert cached == 0
        cold[tuple(ids)] = generation
    for ids in (prompt, other):
        generation, cached = run(ids)
        assert generation == cold[tuple(ids)]
        assert cached >= 32 or length < 50
        assert cached % CHUNK == 0


def test_the_next_turn_begins_where_the_last_ended(world: World) -> None:
    prompt = prompt_of(20)
    first = world.submit(prompt, max_new_tokens=30)
    world.run()
    turn = [*prompt, *first.result(0)[0].token_ids, *prompt_of(5, seed=1)]
    second, exact = world.submit(turn), world.submit(turn, cache_generated=False)
    iterations = world.run()
    assert second.cached_tokens == [48]  # of 49 that were read: the last token never is
    assert exact.cached_tokens == [0]
    assert sum(iteration.prefilled_tokens for iteration in iterations[:1]) <= len(turn) - 48


@pytest.mark.parametrize("length", [40, 90])
def test_equal_prompts_at_once_are_read_once(world: World, length: int) -> None:
    """By the one that comes first, while the others wait."""
    streams = [world.submit([*prompt_of(length), 5, 6, seed]) for seed in range(1, 5)]
    iterations = world.run()
    kept = length // BLOCK_TOKENS * BLOCK_TOKENS
    assert [stream.cached_tokens[0] for stream in streams] == [0, kept, kept, kept]
    assert sum(iteration.prefilled_tokens for iteration in iterations) <= length + 3 + 3 * (length + 3 - kept)
    for stream in streams:
        assert len(stream.result(0)[0].token_ids) == 1


def test_continuations_of_one_prompt_count_once(world: World) -> None:
    world.submit(prompt_of(60), max_new_tokens=2)
    world.run()
    stream = world.submit(prompt_of(60), n=6, sampling=Sampling(temperature=1, seed=1))
    world.run()
    assert stream.cached_tokens == [48]
    assert world.prefixes.stats().queries == 120


def test_one_cache_serves_all_where_only_the_head_is_updated(runtime: Runtime, tmp_path: Path) -> None:
    world = World(runtime, 0, tmp_path, blocks=64)
    cached = []
    for adapt in (
        Adapt("none"),
        Adapt("centroid"),
        Adapt("request"),
        Adapt("static", factors=random_factors(runtime, 1)),
    ):
        stream = world.submit(prompt_of(70), adapt=adapt)
        world.run()
        cached += stream.cached_tokens
    assert cached == [0, 64, 64, 64]


def test_salts_share_nothing_and_are_cleared_alone(world: World) -> None:
    def cached(salt: str) -> int:
        stream = world.submit(prompt_of(60), cache_salt=salt)
        world.run()
        return stream.cached_tokens[0]

    assert [cached(salt) for salt in ("a:1", "a:2", "b:1", "", "a:1", "b:1", "")] == [0, 0, 0, 0, 48, 48, 48]
    assert world.prefixes.stats("a:").tokens == 2 * world.prefixes.stats("b:").tokens == 96
    world.prefixes.clear("a:")
    assert [cached(salt) for salt in ("b:1", "a:1")] == [48, 0]


def test_a_text_longer_than_the_cache_keeps_its_beginning(updated: Runtime, tmp_path: Path) -> None:
    world = World(updated, 0, tmp_path, blocks=3)
    cached = []
    for seed in (0, 1, 1):
        stream = world.submit(prompt_of(100, seed))
        world.run()
        cached += stream.cached_tokens
        check_structure(world.prefixes)
    assert cached == [0, 0, 48]
    assert world.prefixes.stats().evictions == 48


@pytest.fixture
def engine(plain: Runtime) -> Iterator[Engine]:
    with Engine(plain, prefill_tokens=16, prefix_cache_bytes=2**20) as engine:
        yield engine


def test_an_engine_has_one(engine: Engine) -> None:
    for expected in (0, 48):
        stream = engine.submit([prompt_of(60)], mode="none", cache_salt="a:", max_new_tokens=1)
        stream.result(60)
        assert stream.cached_tokens == [expected]
    stats = engine.prefix_cache_stats()
    assert (stats.tokens, stats.queries, stats.hits) == (48, 120, 48)
    assert stats.bytes <= stats.max_bytes <= 2**20
    engine.clear_prefix_cache("b:")
    assert engine.prefix_cache_stats("a:").tokens == 48
    engine.clear_prefix_cache("a:")
    assert engine.prefix_cache_stats().tokens == 0


def test_it_takes_a_tenth_of_the_free_memory(plain: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    from chameleon_deploy.runtime.engine import engine as module

    monkeypatch.setattr(module, "free_memory", lambda: 2**24)
    with Engine(plain, rows=1) as engine:
        assert 0.09 * 2**24 < engine.prefix_cache_stats().max_bytes <= 0.1 * 2**24


def test_it_can_be_turned_off(plain: Runtime) -> None:
    with Engine(plain, prefix_cache_bytes=0) as engine:
        for _ in range(2):
            stream = engine.submit([prompt_of(60)], mode="none", max_new_tokens=1)
            stream.result(60)
            assert stream.cached_tokens == [0]
        assert engine.prefix_cache_stats().max_bytes == 0


def test_a_decoder_without_slots_has_none(portable: Runtime) -> None:
    with Engine(portable) as engine:
        assert engine.prefix_cache_stats().max_bytes == 0
    with pytest.raises(InputError, match="no prefix cache"):
        Engine(portable, prefix_cache_bytes=2**20)


def test_a_salt_that_is_no_text_is_refused() -> None:
    with pytest.raises(InputError, match="cache_salt must be a string, got a int"):
        Generate(cache_salt=7)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["texts", "ids"])
def test_scores_of_continuations_share_their_prompt(plain: Runtime, kind: str) -> None:
    """Multiple choice: the question is read once, and each answer has the log-probabilities that `score` gives it."""
    question = "The river runs through the town. Then it comes to the sea. Which is"
    prompts: Any = [2 * question] * 3 if kind == "texts" else [prompt_of(60)] * 3
    answers: Any = [" a lake", " a road to", "xyz"] if kind == "texts" else [[5, 0, 7], [9], [300, 2]]
    heads, wholes = plain.encode(prompts), [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    with Engine(plain, prefill_tokens=16, prefix_cache_bytes=2**22) as engine:
        stream = engine.submit_scores(prompts, answers, mode="none")
        for head, whole, found in zip(heads, plain.encode(wholes), stream.result(60), strict=True):
            assert found.token_ids == whole[len(head) :]
            expected = plain.score([whole], mode="none")[0].token_logprobs[len(head) - 1 :]
            np.testing.assert_allclose(found.token_logprobs or (), expected, atol=1e-4)
        assert stream.cached_tokens[0] == 0 < 32 <= min(stream.cached_tokens[1:])
        again = engine.submit_scores(prompts[:1], answers, mode="none", cache_salt="mine")
        assert [each.token_ids for each in again.result(60)] == [each.token_ids for each in stream.result()]
        assert again.cached_tokens[0] == 0
        for wrong in list[Any]([[answers[0]] * 2, [answers[0][:0]] * 3, [[1] * 100] * 3, [[1, 2], "a", "b"]]):
            with pytest.raises(ChameleonError):
                engine.submit_scores(prompts, wrong, mode="none")

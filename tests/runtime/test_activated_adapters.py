"""Activated adapters: a text up to its last invocation is the base model's, then the adapter's, as in PEFT."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import peft
import pytest
import torch

import chameleon_deploy
from chameleon_deploy import Adapt, Engine, Runtime
from chameleon_deploy.contract.adapter_file import read_adapter, write_adapter
from chameleon_deploy.errors import AdapterError, CheckpointError, ProviderError
from chameleon_deploy.export.exporter import export_bundle
from chameleon_deploy.reference.adapters import AdaptedBase, AdapterLogits, load_adapted
from chameleon_deploy.runtime import adapters as module
from chameleon_deploy.runtime.adapters import Blend, last_place
from chameleon_deploy.runtime.scoring import prompt_logprobs
from chameleon_deploy.verify import adapter_checks
from chameleon_deploy.verify.gates import gate_of
from tests.adapters import LLAMA_LAYERS, base_model, save_adapter
from tests.devices import on_cpu

INVOCATION, OTHER = [7, 301, 44], [99]
LAYERS = [*LLAMA_LAYERS, "lm_head"]


def prompt_of(length: int, seed: int = 0, *invocations: tuple[int, list[int]]) -> list[int]:
    """Return random tokens from 100 on with invocations at such places."""
    ids: list[int] = np.random.default_rng(seed).integers(100, 300, length).tolist()
    for at, tokens in invocations:
        ids[at : at + len(tokens)] = tokens
    return ids


# The last of two invocations counts; at the beginning, at the end, as the last token, and nowhere.
ROWS = [
    prompt_of(30, 0, (5, INVOCATION), (20, INVOCATION)),
    prompt_of(24, 1, (8, OTHER)),
    prompt_of(20, 2, (6, INVOCATION)),
    prompt_of(20, 3, (6, INVOCATION)),
    prompt_of(12, 4, (0, INVOCATION)),
    prompt_of(17, 5, (14, INVOCATION)),
    prompt_of(17, 6, (3, OTHER), (16, OTHER)),
    prompt_of(16, 7),
    prompt_of(110, 8, (20, INVOCATION), (85, INVOCATION)),
]
NAMES = ["first", "second", "plain", None, "first", "first", "second", "first", "first"]


@pytest.fixture(scope="module")
def directories(llama_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    path = tmp_path_factory.mktemp("activated")
    tokens = {"first": INVOCATION, "second": OTHER, "plain": None}
    return {
        name: save_adapter(
            llama_path / "base", path / name, seed, 0.2,
            r=2 + seed, lora_alpha=4, target_modules=LAYERS, alora_invocation_tokens=tokens[name],
        )
        for seed, name in enumerate(tokens)
    }  # fmt: skip


@pytest.fixture(scope="module")
def adapted(llama_path: Path, directories: dict[str, Path]) -> AdaptedBase:
    return load_adapted(str(llama_path / "base"), directories)


@pytest.fixture(scope="module")
def opened(adapted: AdaptedBase, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Runtime]:
    """Return a function that opens a bundle with the adapters in a precision."""
    path = tmp_path_factory.mktemp("bundles")

    @cache
    def open_one(precision: Literal["fp32", "int8"]) -> Runtime:
        export_bundle(adapted, path / precision, precision=precision)
        return chameleon_deploy.load(path / precision, threads=1)

    return open_one


@pytest.fixture(scope="module")
def runtime(opened: Callable[[str], Runtime]) -> Runtime:
    return opened("fp32")


@pytest.fixture(scope="module")
def theirs(llama_path: Path, directories: dict[str, Path]) -> Any:
    """A PEFT model with all of the adapters."""
    model = None
    for name, path in directories.items():
        if model is None:
            model = peft.PeftModel.from_pretrained(base_model(llama_path / "base"), path, adapter_name=name)
        else:
            model.load_adapter(path, name)
    return model.eval()  # type: ignore[union-attr]


@torch.no_grad()
def peft_rows(model: Any, rows: Sequence[Sequence[int]], names: Sequence[str | None]) -> list[Any]:
    """PEFT's logits [tokens, vocab] of each row alone."""
    found = []
    for ids, name in zip(rows, names, strict=True):
        logits = model(input_ids=torch.tensor([list(ids)]), adapter_names=[name or "__base__"]).logits[0].numpy()
        found.append(logits)
    return found


def test_places() -> None:
    assert [Blend(()).start([1, 2])] == [0]
    assert [last_place(ids, INVOCATION if name == "first" else OTHER) for ids, name in zip(ROWS, NAMES, strict=True)
            if name in ("first", "second")] == [20, 8, 0, 14, 16, None, 85]  # fmt: skip
    assert last_place([7, 301], INVOCATION) is None
    assert last_place([1, 1, 1, 1], [1, 1]) == 2
    assert last_place([7, 8], [7, 8]) == 0


def test_the_reference_is_peft(adapted: AdaptedBase, theirs: Any) -> None:
    reference = AdapterLogits(adapted)
    for row, expected in enumerate(peft_rows(theirs, ROWS, NAMES)):
        np.testing.assert_allclose(reference(ROWS[row], NAMES, row).numpy(), expected, atol=5e-5)


def test_rows_of_a_mixed_batch_are_peft_rows(runtime: Runtime, theirs: Any) -> None:
    """Scores, log-probabilities of prompts, and the tokens and log-probabilities of continuations."""
    expected = peft_rows(theirs, ROWS, NAMES)
    scores = runtime.score(ROWS, adapters=NAMES)
    greedy = runtime.generate(ROWS, max_new_tokens=6, adapters=NAMES, sampling=chameleon_deploy.Sampling(logprobs=1))
    with Engine(runtime, prefill_tokens=16, rows=4) as engine:
        streamed = engine.submit(
            ROWS, max_new_tokens=6, adapters=NAMES, sampling=chameleon_deploy.Sampling(logprobs=1)
        ).result(60)
    for row, (ids, name) in enumerate(zip(ROWS, NAMES, strict=True)):
        logprobs = torch.log_softmax(torch.tensor(expected[row]), -1).numpy()
        own = logprobs[np.arange(len(ids) - 1), ids[1:]]
        np.testing.assert_allclose(scores[row].token_logprobs, own, atol=5e-4)
        factors = runtime.adapt([ids], adapters=[name]).factors
        echoed = [choice.logprob for choice in prompt_logprobs(ids, runtime.decoder, factors, 1)]
        np.testing.assert_allclose(np.array(echoed, float), own, atol=5e-4)
        tokens = their_tokens(theirs, ids, name, 6)
        for found in (greedy[row], streamed[row]):
            assert found.token_ids == tokens[: len(found.token_ids)]
            assert found.token_logprobs is not None
            assert abs(found.token_logprobs[0] - logprobs[-1].max()) < 5e-4


@torch.no_grad()
def their_tokens(model: Any, ids: Sequence[int], name: str | None, count: int) -> list[int]:
    prompt = torch.tensor([list(ids)])
    found = model.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), adapter_names=[name or "__base__"],
        max_new_tokens=count, do_sample=False, pad_token_id=0,
    )  # fmt: skip
    return [int(token) for token in found[0, len(ids) :]]


def test_a_row_is_bitwise_the_base_up_to_its_invocation(runtime: Runtime) -> None:
    ids = ROWS[0]
    own, base = (
        runtime.score([ids], adapters=[name])[0].token_logprobs for name in ("first", None)
    )  # fmt: skip
    assert own[:16] != [] and np.allclose(own[:20], base[:20], atol=1e-5)
    assert not np.allclose(own[20:], base[20:], atol=1e-3)
    unused = runtime.generate([ROWS[7]], adapters=["first"])[0]
    assert unused == runtime.generate([ROWS[7]], mode="none")[0]


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_adapters_share_the_prefix_of_the_base(opened: Callable[[str], Runtime], precision: str) -> None:
    runtime = opened(precision)
    text = prompt_of(60, 9)
    rows: list[list[int]] = [[*text, *INVOCATION, 5], [*text, *OTHER, 5], [*text, 8, 9]]
    names: list[str | None] = ["first", "second", None]
    options: dict[str, Any] = {"max_new_tokens": 4, "cache_generated": False}

    def run(engine: Engine, row: int) -> tuple[Any, int]:
        stream = engine.submit([rows[row]], adapters=[names[row]], **options)
        return stream.result(60)[0], stream.cached_tokens[0]

    with Engine(runtime, prefill_tokens=32, prefix_cache_bytes=2**22) as engine:
        cold = []
        for row in range(3):
            engine.clear_prefix_cache()
            cold.append(run(engine, row))
        assert [cached for _, cached in cold] == [0, 0, 0]
        for row in (2, 0, 1, 2):
            assert run(engine, row)[0] == cold[row][0]
        engine.clear_prefix_cache()
        assert [run(engine, row)[1] for row in (2, 0, 1, 0)] == [0, 32, 32, 32]
        # What follows the invocation is of this adapter and this place alone.
        options["cache_generated"] = True
        engine.clear_prefix_cache()
        longer = [*rows[0], *prompt_of(30, 10)]
        for prompt, cached in ((longer, 0), ([*longer, 3], 80), ([*longer, *INVOCATION], 48)):
            rows[0] = prompt
            assert run(engine, 0)[1] == cached
        rows[1] = [*longer, *OTHER]
        assert run(engine, 1)[1] == 80


def first_place(ids: Sequence[int], tokens: Sequence[int]) -> int | None:
    return next((at for at in range(len(ids)) if list(ids[at : at + len(tokens)]) == list(tokens)), None)


def one_late(ids: Sequence[int], tokens: Sequence[int]) -> int | None:
    at = last_place(ids, tokens)
    return None if at is None else at + 1


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("fault", [None, first_place, one_late], ids=lambda fault: getattr(fault, "__name__", "none"))
def test_verify_compares_each_row_with_the_reference(
    opened: Callable[[str], Runtime],
    adapted: AdaptedBase,
    monkeypatch: pytest.MonkeyPatch,
    precision: Literal["fp32", "int8"],
    fault: Callable[..., Any] | None,
) -> None:
    runtime = opened(precision)
    if fault is not None:
        monkeypatch.setattr(module, "last_place", fault)
    reference, rows = AdapterLogits(adapted), [prompt_of(60, seed) for seed in range(8)]
    names = adapter_checks.in_turn(list(adapted.adapters), len(rows))
    rows = adapter_checks.invoked(adapted, rows, names)
    gate = gate_of(precision, "cpu", updates_trunk=True)
    checks = [
        check
        for name in ("first", "second")
        for check in adapter_checks.check_adapter(runtime, reference, rows[:4], gate, name)
    ]
    assert all(check.passed for check in checks) == (fault is None), checks
    if fault is None:
        places = list(adapter_checks.check_wrong_places(runtime, reference, rows, names))
        assert [check.passed for check in places] == [True, True], places
        assert all("not checked" not in check.note for check in places)


def test_the_portable_graph_reads_them_too(runtime: Runtime) -> None:
    portable = on_cpu(runtime.bundle, "decoder")
    for ours, expected in zip(portable.score(ROWS, adapters=NAMES), runtime.score(ROWS, adapters=NAMES), strict=True):
        np.testing.assert_allclose(ours.token_logprobs, expected.token_logprobs, atol=5e-4)
    found, continued = (each.generate(ROWS, max_new_tokens=5, adapters=NAMES) for each in (portable, runtime))
    assert [row.token_ids for row in found] == [row.token_ids for row in continued]


def test_files_carry_the_invocation(
    runtime: Runtime, llama_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHAMELEON_DEPLOY_CACHE", str(tmp_path / "cache"))
    spec = runtime.manifest.adaptation
    assert spec.invocation_tokens == {"first": tuple(INVOCATION), "second": tuple(OTHER)}
    options: dict[str, Any] = {"r": 2, "target_modules": ["q_proj"], "alora_invocation_tokens": INVOCATION}
    directory = save_adapter(llama_path / "base", tmp_path / "peft", 3, 0.3, **options)
    runtime.load_adapter("loaded", directory)
    assert runtime.adapters["loaded"].invocation_tokens == tuple(INVOCATION)
    ours, base = (np.array(runtime.score(ROWS[:1], adapters=[name])[0].token_logprobs) for name in ("loaded", None))
    assert np.abs(ours - base)[:20].max() < 1e-5 < 1e-3 < np.abs(ours - base)[20:].max()
    with pytest.raises(AdapterError, match="activated by tokens"):
        runtime.score(ROWS[:1], adapters=[{"loaded": 0.5, "plain": 0.5}])
    halved = np.array(runtime.score(ROWS[:1], adapters=[{"loaded": 0.5}])[0].token_logprobs)
    assert np.abs(halved - base)[:20].max() < 1e-5 < np.abs(halved - ours)[20:].max()
    file = next((tmp_path / "cache").rglob("adapter.safetensors"))
    stored = read_adapter(file, spec)
    runtime.unload_adapter("loaded")
    for tokens, message in (([512], "hold 512"), ([-1], "no token id"), ([1] * 300, "1 to 256")):
        write_adapter(tmp_path / "wrong.safetensors", stored.factors, spec, tokens)
        with pytest.raises(AdapterError, match=message):
            runtime.load_adapter("wrong", tmp_path / "wrong.safetensors")


def test_a_device_refuses_them(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime.backend, "provider", "cuda")
    with pytest.raises(ProviderError, match="run on provider 'cpu'"):
        runtime.score(ROWS[:1], adapters=["first"])
    assert runtime.score(ROWS[:1], Adapt(adapters=["plain"]))


def test_a_base_without_such_tokens_refuses_them(llama_path: Path, tmp_path: Path) -> None:
    base = llama_path / "base"
    directory = save_adapter(
        base, tmp_path / "far", r=1, target_modules=["q_proj"], alora_invocation_tokens=[3, 100_000]
    )
    with pytest.raises(CheckpointError, match="vocabulary"):
        load_adapted(str(base), {"far": directory})

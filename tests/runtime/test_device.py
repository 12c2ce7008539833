"""The code that drives a GPU, on the memory of this machine: real graphs at real addresses, see fake_cuda.py."""

from __future__ import annotations

import gc
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chameleon_deploy import Engine, Runtime, Sampling
from chameleon_deploy.contract.bundle import Bundle, LimitsSpec, open_bundle
from chameleon_deploy.errors import DeviceError, GraphError, InputError, LengthError, NumericError
from chameleon_deploy.export.exporter import export_bundle
from chameleon_deploy.reference.checkpoint import Checkpoint, load_checkpoint
from chameleon_deploy.reference.inference import RowLogits
from chameleon_deploy.reference.random import random_checkpoint
from chameleon_deploy.runtime.backend import DeviceBackend
from chameleon_deploy.runtime.device import slot_cache
from chameleon_deploy.runtime.device.cuda import CudaDevice
from chameleon_deploy.verify import checkpoint_checks
from tests.conftest import Exported
from tests.devices import needs_no_gpu, on_cpu, with_engines, with_sessions
from tests.fake_cuda import FakeCudart
from tests.rows import head_factors, random_rows


@pytest.fixture(scope="session")
def opened(bundle: Path) -> Bundle:
    return open_bundle(bundle)


@pytest.fixture(scope="session", params=[with_sessions, with_engines])
def on_device(request: pytest.FixtureRequest, opened: Bundle) -> Runtime:
    made: Runtime = request.param(opened, FakeCudart())
    return made


def device_of(runtime: Runtime) -> CudaDevice:
    backend = runtime.backend
    assert isinstance(backend, DeviceBackend)
    return backend.device


@given(seed=st.integers(0, 10_000), batch=st.integers(1, 12), slots=st.sampled_from([4, 16, 128]))
@settings(max_examples=15, deadline=None)
def test_results_equal_the_cpus(on_device: Runtime, runtime: Runtime, seed: int, batch: int, slots: int) -> None:
    rows = random_rows(seed, batch, 90)
    limits = [1 + (seed + 3 * i) % 11 for i in range(batch)]
    sampling = [Sampling(temperature=(seed + i) % 2, seed=seed, repetition_penalty=1 + i % 2) for i in range(batch)]
    mode: Any = ("none", "centroid", "request", "cohort")[seed % 4]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slot_cache, "SLOTS", slots)
        hows: tuple[dict[str, Any], ...] = ({}, {"sampling": sampling})
        for how in hows:
            ours, theirs = (r.generate(rows, max_new_tokens=limits, mode=mode, **how) for r in (on_device, runtime))
            assert ours == theirs
    for a, b in zip(on_device.score(rows, mode=mode), runtime.score(rows, mode=mode), strict=True):
        np.testing.assert_allclose(a.token_logprobs, b.token_logprobs, atol=1e-5)


def test_the_engine_runs_static_batches(on_device: Runtime, runtime: Runtime) -> None:
    rows, hot = random_rows(9, 7, 60), Sampling(temperature=1.2, seed=4)
    modes: tuple[Any, ...] = ("request", "none", "centroid", "cohort", "request", "centroid", "none")
    with Engine(on_device, rows=3) as engine:
        assert engine.batching == "static"
        streams = [
            engine.submit([row], mode=mode, sampling=[hot if i % 2 else Sampling()], max_new_tokens=3 + 2 * i)
            for i, (row, mode) in enumerate(zip(rows, modes, strict=True))
        ]
        found = [stream.result(60)[0] for stream in streams]
    for i, (row, mode) in enumerate(zip(rows, modes, strict=True)):
        sampling = [hot if i % 2 else Sampling()]
        assert found[i] == runtime.generate([row], mode=mode, sampling=sampling, max_new_tokens=3 + 2 * i)[0]


def test_it_passes_the_gates(opened: Bundle, mini: Checkpoint) -> None:
    made = with_engines(opened, FakeCudart())
    checks = checkpoint_checks.verify_checkpoint(made, RowLogits(mini), random_rows(5, 32, 60), True, lambda *_: None)
    assert not [check for check in checks if not check.passed]


@pytest.mark.parametrize(("regime", "make"), [("chameleon", with_engines), ("lora", with_sessions)])
def test_updates_of_all_layers_pass_the_gates(regime: Any, make: Any, tmp_path: Path) -> None:
    random_checkpoint(tmp_path / "checkpoint", "mini", regime, targets=["all"])
    checkpoint = load_checkpoint(tmp_path / "checkpoint")
    export_bundle(checkpoint, tmp_path / "bundle")
    made = make(open_bundle(tmp_path / "bundle"), FakeCudart())
    checks = checkpoint_checks.verify_checkpoint(
        made, RowLogits(checkpoint), random_rows(5, 8, 60), True, lambda *_: None
    )
    assert [check.name for check in checks if not check.passed] == []


def test_a_lora_bundle(lora_bundle: Path, lora_runtime: Runtime) -> None:
    ours, rows = with_engines(open_bundle(lora_bundle), FakeCudart()), random_rows(1, 4, 30)
    assert ours.generate(rows) == lora_runtime.generate(rows)


def test_a_cache_of_half_precision(exported: Exported) -> None:
    """Slots are counted in bytes; logits differ from the CPU's by what float16 rounds."""
    opened = open_bundle(exported("mini", "fp16"))
    ours, theirs, rows = with_engines(opened, FakeCudart()), on_cpu(opened), random_rows(1, 5, 60)
    for a, b in zip(ours.score(rows), theirs.score(rows), strict=True):
        np.testing.assert_allclose(a.token_logprobs, b.token_logprobs, atol=5e-3)
    for ours_row, theirs_row in zip(ours.generate(rows), theirs.generate(rows), strict=True):
        assert ours_row.token_ids[:4] == theirs_row.token_ids[:4]


def test_callers_factors(on_device: Runtime, runtime: Runtime) -> None:
    rng = np.random.default_rng(0)
    lora_A, lora_B = (rng.normal(size=(3, n)).astype(np.float32) * 0.2 for n in (64, 512))
    how: Any = {"mode": "static", "factors": head_factors(lora_A, lora_B)}
    assert on_device.generate([[1, 2]], **how) == runtime.generate([[1, 2]], **how)


def test_gaps_are_closed_where_an_engine_has_no_more_slots(
    opened: Bundle, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long prompt beside short ones that are continued for long: together more slots than the model has positions."""
    rows = [list(range(110)), [5], [6, 7], list(range(40))]
    rooms: list[tuple[int, int]] = []
    make_room = slot_cache.SlotCacheDecoder._make_room

    def watched(self: Any, cache: Any) -> None:
        before = cache.width
        make_room(self, cache)
        rooms.append((before, cache.width))

    monkeypatch.setattr(slot_cache.SlotCacheDecoder, "_make_room", watched)
    for make in (with_sessions, with_engines):
        rooms.clear()
        limits = [15, 120, 110, 80]
        assert make(opened, FakeCudart()).generate(rows, max_new_tokens=limits) == runtime.generate(
            rows, max_new_tokens=limits
        )
        assert any(after < before for before, after in rooms)


def test_a_step_moves_nothing_but_token_ids(on_device: Runtime) -> None:
    """Per row and step 16 bytes up, an id and its position, padded to 256, and 8 down, whatever the model's size."""
    device, rows = device_of(on_device), random_rows(3, 5, 20)
    factors = on_device.adapt(rows, on_device=True).factors
    up, down = device.uploaded, device.downloaded
    decoder: Any = on_device.decoder
    logits, cache = decoder.prefill(rows, factors, 60)
    size = sum(np.asarray(array).nbytes for array in factors.sets.tensors.values())
    assert device.uploaded - up < size  # the hypernetwork's outputs were bound, not copied
    for step in range(20):
        token_ids = logits.greedy()
        if step == 1:
            up, down = device.uploaded, device.downloaded  # binding the first step uploads which factors rows use
        logits = decoder.step(token_ids, factors, cache)
    assert device.uploaded - up == 19 * 2 * 256
    assert device.downloaded - down == 18 * 5 * 8


def test_scores_bring_no_logits_to_the_host(on_device: Runtime) -> None:
    device, rows = device_of(on_device), random_rows(4, 4, 60)
    down = device.downloaded
    on_device.score(rows)
    assert device.downloaded - down == 4 * (max(map(len, rows)) - 1) * 4


def test_memory_is_given_back(opened: Bundle) -> None:
    for make in (with_sessions, with_engines):
        cudart = FakeCudart()
        runtime = make(opened, cudart)
        used = []
        for seed in range(6):
            runtime.generate(random_rows(seed % 2, 4, 40), max_new_tokens=6)
            gc.collect()
            device_of(runtime).empty((1,), "int64")  # frees what has been released
            used.append(cudart.used)
        assert used[1] == used[3] == used[5]


def test_steps_are_replayed_and_contexts_used_again(opened: Bundle) -> None:
    cudart = FakeCudart()
    runtime = with_engines(opened, cudart)
    rows = random_rows(0, 3, 20)
    for _ in range(5):
        runtime.generate(rows, max_new_tokens=10)
    assert cudart.launched >= 5 * 2 * 7  # decoder and chooser, from the second step on
    backend = runtime.backend
    assert isinstance(backend, DeviceBackend)
    contexts = {role: len(graph._engine.contexts) for role, graph in backend._graphs.items()}  # type: ignore[attr-defined]
    assert contexts["decoder"] <= 3
    assert max(contexts.values()) <= 4


def test_what_cannot_be_recorded_runs_all_the_same(
    opened: Bundle, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeCudart, "cudaGraphInstantiate", lambda *_: (FakeCudart().cudaFree(0)[0], None))
    cudart, rows = FakeCudart(), random_rows(0, 3, 20)
    assert with_engines(opened, cudart).generate(rows) == runtime.generate(rows)
    assert not cudart.launched


def test_the_fake_notices_a_stale_graph(opened: Bundle) -> None:
    """What makes the tests above worth something: a context that is touched after it was recorded is an error."""
    runtime, rows = with_engines(opened, FakeCudart()), [[1, 2], [3]]
    factors = runtime.adapt(rows, on_device=True).factors
    decoder: Any = runtime.decoder
    _, cache = decoder.prefill(rows, factors, 20)
    for _ in range(3):
        decoder.step(np.array([1, 2]), factors, cache)
    cache.step.decoder._context.set_tensor_address("logits", cache.step.numbers.address)
    with pytest.raises(DeviceError, match="cudaGraphLaunch"):
        decoder.step(np.array([1, 2]), factors, cache)


def test_the_fake_notices_memory_that_was_not_set(opened: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that is not zeroed gives NaN, although the mask hides every slot that has not been written."""
    monkeypatch.setattr(CudaDevice, "zeros", CudaDevice.empty)
    with pytest.raises((NumericError, DeviceError, IndexError)):
        with_sessions(opened, FakeCudart()).generate([[1, 2, 3]], max_new_tokens=4)


def test_many_threads(on_device: Runtime, runtime: Runtime) -> None:
    batches = [random_rows(seed, 3, 30) for seed in range(6)]
    expected = [runtime.generate(rows, max_new_tokens=6) for rows in batches]
    results: list[Any] = [None] * 18

    def work(i: int) -> None:
        results[i] = on_device.generate(batches[i % 6], max_new_tokens=6)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(18)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(results[i] == expected[i % 6] for i in range(18))


def test_logits_that_are_not_finite(on_device: Runtime) -> None:
    huge = head_factors(np.full((2, 64), 1e30, np.float32), np.full((2, 512), 1e30, np.float32))
    for method in (on_device.score, on_device.generate):
        with pytest.raises(NumericError, match="check the factors"):
            method([[1, 2, 3]], mode="static", factors=huge)


@pytest.mark.parametrize(
    ("limits", "error", "message"),
    [
        ((2, 128, 127, 8), InputError, "batch 3: the engines of this bundle take 2"),
        ((8, 20, 127, 8), LengthError, "sequence 30: the engines of this bundle take 20"),
        ((8, 128, 32, 8), LengthError, "past 33: the engines of this bundle take 32"),
        ((8, 128, 127, 1), InputError, "factor_sets 3: the engines of this bundle take 1"),
    ],
)
def test_a_call_beyond_the_limits(opened: Bundle, limits: tuple[int, ...], error: Any, message: str) -> None:
    runtime = with_engines(opened, FakeCudart(), LimitsSpec(*limits))
    with pytest.raises(error, match=message):
        runtime.generate([list(range(30)), [1], [2]], max_new_tokens=5, mode="request")


def test_scoring_respects_the_batch_of_the_engines(opened: Bundle, runtime: Runtime) -> None:
    rows = random_rows(2, 9, 6)
    limited = with_engines(opened, FakeCudart(), LimitsSpec(4, 128, 127, 9))
    for a, b in zip(limited.score(rows), runtime.score(rows), strict=True):
        np.testing.assert_allclose(a.token_logprobs, b.token_logprobs, atol=1e-5)


def test_a_profile_that_does_not_fit_is_refused(opened: Bundle) -> None:
    runtime = with_engines(opened, FakeCudart())
    rank = head_factors(np.zeros((9, 64), np.float32), np.zeros((9, 512), np.float32))
    with pytest.raises(InputError, match=r"no profile of the engine of decoder.onnx takes this call: lm_head.lora_A"):
        runtime.score([[1, 2]], mode="static", factors=rank)


def test_no_memory_left(opened: Bundle) -> None:
    runtime = with_sessions(opened, FakeCudart(capacity=600_000))
    with pytest.raises(DeviceError, match="cudaMalloc: cudaErrorMemoryAllocation"):
        runtime.generate(random_rows(0, 12, 100), max_new_tokens=20)
    assert len(runtime.generate([[1]], max_new_tokens=2)) == 1  # and the next request runs


def test_an_address_says_neither_dtype_nor_shape(opened: Bundle) -> None:
    runtime = with_sessions(opened, FakeCudart())
    device, backend = device_of(runtime), runtime.backend
    assert isinstance(backend, DeviceBackend)
    logits, ids = device.zeros((1, 1, 512), "float32"), device.zeros((1, 1), "int64")
    for wrong in ({"logits": device.zeros((1, 1, 512), "float16"), "token_ids": ids},
                  {"logits": device.zeros((1, 1, 511), "float32"), "token_ids": ids},
                  {"logits": logits, "token_ids": device.zeros((1,), "int64")}):  # fmt: skip
        with pytest.raises(GraphError, match=r"chooser.onnx: "):
            backend._graphs["chooser"].bind(wrong)


def test_bfloat16_is_rounded_to_nearest() -> None:
    device = CudaDevice(FakeCudart())
    values = np.array([1.0, -2.5, 3.14159, 1.00390625, 1.01171875, 0.0], np.float32)
    stored = np.asarray(device.upload(values, "bfloat16"))
    import torch

    np.testing.assert_array_equal(stored, torch.from_numpy(values).bfloat16().float().numpy())


@needs_no_gpu
def test_the_real_bindings_take_our_arguments() -> None:
    """Without a driver every call of cuda-python comes back with a status; a wrong argument would be a TypeError."""
    from cuda.bindings import runtime as cudart

    device = CudaDevice(FakeCudart())
    array = device.zeros((2, 2), "float32")
    device._cudart = cudart
    calls: list[Any] = [
        lambda: device.empty((2, 2), "float32"),
        lambda: device.zeros((2, 2), "float32"),
        lambda: device.write(array, np.zeros((2, 2))),
        lambda: device.read(array),
        lambda: device.copy(array.address, 8, array.address, 8, 8, 2),
        device.synchronize,
        lambda: device.capture(lambda: None),
        lambda: CudaDevice(cudart),
        lambda: device._call("cudaMemsetAsync", array.address, 0, 4, device.stream),
        lambda: device._call("cudaGraphInstantiate", cudart.cudaGraph_t(0), 0),
        lambda: device._call("cudaGraphDestroy", cudart.cudaGraph_t(0)),
        lambda: device._call("cudaGraphLaunch", cudart.cudaGraphExec_t(0), device.stream),
        lambda: device._call("cudaGraphExecDestroy", cudart.cudaGraphExec_t(0)),
        lambda: device._call("cudaFree", array.address),
    ]
    for call in calls:
        with pytest.raises(DeviceError, match=r"cudaErrorInsufficientDriver|cudaErrorNoDevice|cudaErrorSystem"):
            call()
    device._cudart = FakeCudart()

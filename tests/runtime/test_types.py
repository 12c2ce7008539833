"""Arguments of a wrong type anywhere in the public interface raise a ChameleonError that says what to pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import chameleon_deploy
from chameleon_deploy import Engine, Runtime, Sampling
from chameleon_deploy.errors import ChameleonError
from tests.shared_data import good_bundle

WRONG: tuple[Any, ...] = (
    object(), b"x", 1.5, float("nan"), -1, 2**70, 10**400, True, "x", (), [], [[]], {}, {"x": 1}, {1}, [None], [1.5],
    ["x", 1], [[1], "x"], np.array(1.5), np.array([[["x"]]]), np.zeros((0, 3)), lambda: 0, Sampling, "\udc80", range(3),
    "a\0b",
)  # fmt: skip
GOOD = good_bundle("chameleon_masked")
TEXTS = ["The river", "x"]
A, B = "lm_head.lora_A", "lm_head.lora_B"


@pytest.fixture(scope="module")
def runtime() -> Runtime:
    return chameleon_deploy.load(GOOD, threads=1)


@pytest.fixture(scope="module")
def engine(runtime: Runtime) -> Iterator[Engine]:
    engine = Engine(runtime)
    yield engine
    engine.close()


def foreign(call: Callable[[Any], object], values: tuple[Any, ...] = WRONG) -> list[str]:
    """What a call raises that is no ChameleonError."""
    found = []
    for value in values:
        try:
            call(value)
        except ChameleonError as error:
            assert str(error)
        except Exception as error:
            found.append(f"{value!r:.60}: {type(error).__name__}: {error}")
    return found


@pytest.mark.parametrize("name", ["path", "provider", "mode", "threads", "trusted_keys"])
def test_load(name: str) -> None:
    arguments = {"path": GOOD, "threads": 1}
    assert foreign(lambda value: chameleon_deploy.load(**{**arguments, name: value})) == []


@pytest.mark.parametrize("name", Sampling.__dataclass_fields__)
def test_sampling(name: str, runtime: Runtime) -> None:
    assert foreign(lambda value: runtime.generate(TEXTS, max_new_tokens=1, sampling=Sampling(**{name: value}))) == []


@pytest.mark.parametrize("method", ["adapt", "score", "encode"])
def test_texts(method: str, runtime: Runtime) -> None:
    assert foreign(getattr(runtime, method)) == []


@pytest.mark.parametrize("method", ["adapt", "score", "generate", "stream"])
@pytest.mark.parametrize("name", ["mode", "tenants", "factors", "adapters"])
def test_adaptation(method: str, name: str, runtime: Runtime) -> None:
    mode = {"mode": None, "tenants": "tenant", "factors": "static", "adapters": None}[name]
    values = WRONG + tuple({A: value, B: value} for value in WRONG) + tuple([value] * 2 for value in WRONG)
    call = getattr(runtime, method)
    assert foreign(lambda value: call(TEXTS, **{"mode": mode, name: value}), values) == []


@pytest.mark.parametrize("name", ["prompts", "max_new_tokens", "sampling", "errors", "n", "deadline", "adapt_tokens",
                                  "prompt_lookup_num_tokens"])  # fmt: skip
def test_generate(name: str, runtime: Runtime) -> None:
    arguments = {"prompts": TEXTS, "max_new_tokens": 1}
    values = WRONG + tuple([value] * 2 for value in WRONG)
    assert foreign(lambda value: runtime.generate(**{**arguments, name: value}), values) == []


def test_adapter_files(runtime: Runtime) -> None:
    assert foreign(lambda value: runtime.load_adapter(value, "x.safetensors")) == []
    assert foreign(lambda value: runtime.load_adapter("x", value)) == []
    assert foreign(runtime.unload_adapter) == []


@pytest.mark.parametrize("name", ["rows", "max_waiting", "prefill_tokens", "max_factor_sets", "cohort_window_ms",
                                  "capacity", "observe"])  # fmt: skip
def test_engine(name: str, runtime: Runtime) -> None:
    assert foreign(lambda value: Engine(runtime, **{name: value}).close()) == []


@pytest.mark.parametrize("name", ["prompts", "max_new_tokens", "sampling", "mode", "tenants", "factors", "adapters",
                                  "n", "deadline", "adapt_tokens"])  # fmt: skip
def test_submit(name: str, engine: Engine) -> None:
    arguments = {"prompts": TEXTS, "max_new_tokens": 1}
    assert foreign(lambda value: engine.submit(**{**arguments, name: value}).cancel()) == []

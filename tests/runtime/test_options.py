"""Options as objects or as keywords, and the argument that an error is about."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any, get_type_hints

import numpy as np
import pytest

from chameleon_deploy import Adapt, Engine, Generate, Runtime, Sampling
from chameleon_deploy.errors import ChameleonError, InputError
from chameleon_deploy.runtime.adaptation import AdaptKeywords
from chameleon_deploy.runtime.generation import GenerateKeywords
from tests.rows import random_rows

ROWS = random_rows(11, 3, 20)
HOT = Sampling(temperature=1.3, seed=5)


def test_objects_and_keywords_are_the_same_call(runtime: Runtime) -> None:
    generate: dict[str, Any] = {"max_new_tokens": [3, 9, 5], "sampling": HOT, "n": 2}
    adapt: dict[str, Any] = {"mode": "tenant", "tenants": ["a", "b", "a"], "adapt_tokens": 4}
    expected = runtime.generate(ROWS, **generate, **adapt)
    assert len(expected) == 6
    assert runtime.generate(ROWS, Generate(**generate), Adapt(**adapt)) == expected
    assert runtime.generate(ROWS, Generate(**generate), **adapt) == expected
    last = {t.row: t.generation for t in runtime.stream(ROWS, adapt=Adapt(**adapt), **generate) if t.generation}
    assert [last[row] for row in range(6)] == expected
    with Engine(runtime, rows=6) as engine:
        assert engine.submit(ROWS, Generate(**generate), Adapt(**adapt)).result(60) == expected
        assert engine.submit(ROWS, **generate, **adapt).result(60) == expected
    adapted = runtime.adapt(ROWS, Adapt(**adapt))
    assert adapted.factors.factor_ids.tolist() == runtime.adapt(ROWS, **adapt).factors.factor_ids.tolist()
    np.testing.assert_array_equal(adapted.embeddings, runtime.adapt([ids[:4] for ids in ROWS], mode="none").embeddings)
    assert runtime.score(ROWS, Adapt(**adapt)) == runtime.score(ROWS, **adapt)


def test_rows_of_more_continuations_are_those_of_as_many_prompts(runtime: Runtime) -> None:
    prompt = ROWS[0]
    assert runtime.generate([prompt], sampling=HOT, n=4, mode="request") == runtime.generate(
        [prompt] * 4, sampling=HOT, mode="request"
    )


def test_keywords_are_the_fields(runtime: Runtime) -> None:
    hints = {**get_type_hints(Generate), **get_type_hints(Adapt)}
    assert get_type_hints(GenerateKeywords) == hints
    assert get_type_hints(AdaptKeywords) == {field.name: hints[field.name] for field in fields(Adapt)}
    methods: tuple[Callable[..., Any], ...] = (runtime.generate, runtime.stream, runtime.score, runtime.adapt)
    for method in methods:
        with pytest.raises(TypeError, match="unexpected keyword argument 'modus'"):
            method(ROWS, modus="none")
    with pytest.raises(TypeError, match="unexpected keyword argument 'max_new_tokens'"):
        runtime.score(ROWS, max_new_tokens=3)  # type: ignore[call-arg]


def test_an_object_and_its_fields_are_refused(runtime: Runtime) -> None:
    with pytest.raises(InputError, match=r"pass Generate\(\.\.\.\) or max_new_tokens, not both") as found:
        runtime.generate(ROWS, Generate(), max_new_tokens=3)
    assert found.value.argument == "max_new_tokens"
    with pytest.raises(InputError, match="expected a Adapt, got a Generate") as found:
        runtime.score(ROWS, Generate())  # type: ignore[arg-type]
    assert found.value.argument == "adapt"


@pytest.mark.parametrize(
    ("argument", "wrong"),
    [
        ("prompts", {"prompts": []}), ("prompts", {"prompts": [[10**6]]}), ("prompts", {"prompts": [[1] * 999]}),
        ("max_new_tokens", {"max_new_tokens": 0}), ("max_new_tokens", {"max_new_tokens": [1]}),
        ("sampling", {"sampling": 5}), ("sampling", {"sampling": [Sampling()]}),
        ("logit_bias", {"sampling": Sampling(logit_bias={10**6: 1})}), ("n", {"n": 0}), ("deadline", {"deadline": -1}),
        ("mode", {"mode": "x"}),
        ("adapters", {"adapters": ["x"] * 3, "factors": {}}),
        ("tenants", {"mode": "tenant"}), ("tenants", {"mode": "tenant", "tenants": ["a"]}),
        ("factors", {"mode": "none", "factors": {}}), ("factors", {"mode": "static", "factors": {}}),
        ("factors", {"mode": "static"}), ("adapters", {"adapters": ["x"]}),
        ("adapters", {"adapters": [None, "x", None]}),
        ("conditioning", {"conditioning": [[1.0]]}), ("adapt_tokens", {"adapt_tokens": 0}),
        ("prompt_lookup_num_tokens", {"prompt_lookup_num_tokens": 99}),
    ],
)  # fmt: skip
def test_an_error_names_its_argument(runtime: Runtime, argument: str, wrong: dict[str, Any]) -> None:
    with Engine(runtime) as engine:
        for call in (runtime.generate, runtime.stream, engine.submit):
            with pytest.raises(ChameleonError) as found:
                call(**{"prompts": ROWS, **wrong})
            assert found.value.argument == argument


@pytest.mark.parametrize("name", Sampling.__dataclass_fields__)
def test_an_error_names_its_field_of_sampling(name: str) -> None:
    with pytest.raises(InputError) as found:
        Sampling(**{name: object()})  # type: ignore[arg-type]
    assert found.value.argument == name

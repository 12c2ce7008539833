"""benchmarks/structured_outputs.py: random schemas, and texts that another library validates."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import jsonschema_rs
import pytest

from benchmarks.structured_outputs import PROMPT, Outcome, fault, mask_seconds, outcomes, overheads, random_schema
from chameleon_deploy import Runtime

CHANCE = random.Random(0)
SCHEMAS = [random_schema(CHANCE) for _ in range(40)]


def test_random_schemas_have_every_keyword() -> None:
    for schema in SCHEMAS:
        jsonschema_rs.meta.validate(schema)
    for keyword in ("anyOf", "enum", "pattern", "$ref", "items", "prefixItems", "const", "maxLength", "minimum"):
        assert f'"{keyword}"' in json.dumps(SCHEMAS)
    assert any('"items": {"type": "array"' in json.dumps(schema) for schema in SCHEMAS)


def test_texts_of_random_schemas_validate(runtime: Runtime) -> None:
    limit = 100 - len(runtime.encode([PROMPT])[0])
    found = outcomes(runtime, SCHEMAS, rows=8, limit=limit)
    ended = [outcome for outcome in found if outcome.finished]
    assert [outcome.fault for outcome in found] == [None] * len(SCHEMAS)
    assert len(ended) >= len(SCHEMAS) // 4  # a model of random weights fills its room with strings
    compiling, masks = mask_seconds(runtime, ended[:3])
    assert len(compiling) == 3 and len(masks) == sum(len(outcome.generation.token_ids) for outcome in ended[:3])
    (ratio,) = overheads(runtime, found, rows=2, rounds=1)
    assert ratio > 0


@pytest.mark.parametrize("text", ['{"name": 5', '{"x": 1}', "[]"])
def test_a_wrong_text_is_a_fault(runtime: Runtime, text: str) -> None:
    schema = {"type": "object", "additionalProperties": False}
    (outcome,) = outcomes(runtime, [schema], rows=1, limit=20)
    assert outcome.fault is None and outcome.generation.text == "{}"
    wrong = replace(outcome.generation, text=text)
    assert Outcome(schema, wrong, fault(schema, wrong)).fault

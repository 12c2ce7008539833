"""Generate JSON for random schemas, check it with another library, and time the masks.

    python -m benchmarks.structured_outputs BUNDLE --schemas 1000 --rows 8

Prints how many texts end within the limit, how many of those validate, and in processor time, which other processes
do not change: what compiling and masks take, and tokens with a schema beside as many without one, paired in each round.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import jsonschema_rs
import numpy as np
import typer

import chameleon_deploy
from chameleon_deploy import Engine, Generation, Runtime, Sampling, StructuredOutputs
from chameleon_deploy.runtime.structured_outputs import Grammars
from chameleon_deploy.terminal import console

PROMPT = "A record in JSON, on one line:\n"
PATTERNS = (
    "^[A-Z]{2,4}$", "^[0-9]{3}-[0-9]{4}$", "^(red|green|blue)[0-9]{1,3}$", r"^[a-z]{1,8}@[a-z]{1,8}\.(com|org)$",
    "^#[0-9a-f]{6}$", r"^v[0-9]\.[0-9]{1,2}(-(alpha|beta))?$", "^[A-Za-z ]{0,20}$", "^(a|b(c|d)?){2}$",
)  # fmt: skip
WORDS = ("name", "size", "kind", "date", "colour", "note", "größe", "id", "tags", "place")
VALUES = ("small", "large", 'a "quoted" word', "zwölf", "", 0, -7, 3.5, True, None, "a/b\\c", [1, 2], {"x": 1})


def random_schema(chance: random.Random) -> dict[str, Any]:
    """Return a JSON schema of an object, in which others are nested and referred to."""
    names = [f"d{i}" for i in range(chance.randint(0, 3))]
    schema = _object(chance, 3, names)
    if names:
        # Each refers to those after it alone, and the last may hold itself.
        schema["$defs"] = {name: _schema(chance, 2, names[i + 1 :]) for i, name in enumerate(names)}
        if chance.random() < 0.1:
            properties = {"value": {"type": "integer"}, "next": {"anyOf": [{"type": "null"}, _reference(names[-1])]}}
            schema["$defs"][names[-1]] = _closed(properties, ["value", "next"])
    return schema


def _schema(chance: random.Random, depth: int, names: Sequence[str]) -> dict[str, Any]:
    simple = (_string, _string, _pattern, _enum, _integer, _number, _boolean, _constant)
    nested = (_object, _array, _array, _any_of)
    if names and chance.random() < 0.25:
        return _reference(chance.choice(names))
    return chance.choice(nested if depth > 0 and chance.random() < 0.5 else simple)(chance, depth - 1, names)


def _object(chance: random.Random, depth: int, names: Sequence[str]) -> dict[str, Any]:
    properties = {name: _schema(chance, depth, names) for name in chance.sample(WORDS, chance.randint(1, 4))}
    schema = _closed(properties, [name for name in properties if chance.random() < 0.7])
    if chance.random() < 0.1:
        schema["additionalProperties"] = {"type": "boolean"}
    return schema


def _closed(properties: dict[str, Any], required: list[str]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _array(chance: random.Random, depth: int, names: Sequence[str]) -> dict[str, Any]:
    least = chance.randint(0, 2)
    schema = {"type": "array", "items": _schema(chance, depth, names), "minItems": least}
    if chance.random() < 0.8:
        schema["maxItems"] = least + chance.randint(0, 3)
    if least and chance.random() < 0.2:
        schema["prefixItems"] = [_schema(chance, 0, names) for _ in range(least)]
    return schema


def _any_of(chance: random.Random, depth: int, names: Sequence[str]) -> dict[str, Any]:
    return {"anyOf": [_schema(chance, depth, names) for _ in range(chance.randint(2, 3))]}


def _reference(name: str) -> dict[str, Any]:
    return {"$ref": f"#/$defs/{name}"}


def _string(chance: random.Random, *_: Any) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    if chance.random() < 0.3:
        schema["minLength"] = chance.randint(0, 5)
    if chance.random() < 0.5:
        schema["maxLength"] = chance.randint(5, 30)
    return schema


def _pattern(chance: random.Random, *_: Any) -> dict[str, Any]:
    return {"type": "string", "pattern": chance.choice(PATTERNS)}


def _enum(chance: random.Random, *_: Any) -> dict[str, Any]:
    return {"enum": chance.sample(VALUES, chance.randint(1, 5))}


def _integer(chance: random.Random, *_: Any) -> dict[str, Any]:
    least = chance.randint(-1000, 1000)
    return {"type": "integer", "minimum": least, "maximum": least + chance.randint(0, 2000)}


def _number(chance: random.Random, *_: Any) -> dict[str, Any]:
    return {"type": "number"} if chance.random() < 0.5 else {"type": "number", "minimum": 0, "exclusiveMaximum": 10}


def _boolean(*_: Any) -> dict[str, Any]:
    return {"type": "boolean"}


def _constant(chance: random.Random, *_: Any) -> dict[str, Any]:
    return {"const": chance.choice(VALUES)}


@dataclass(frozen=True)
class Outcome:
    """What a model wrote for a schema. fault: of a text that ended; None where it validates"""

    schema: dict[str, Any]
    generation: Generation
    fault: str | None

    @property
    def finished(self) -> bool:
        return self.generation.finish_reason == "stop"


def outcomes(runtime: Runtime, schemas: Sequence[dict[str, Any]], rows: int, limit: int) -> list[Outcome]:
    """Write a text for each schema, many at once."""
    found = []
    with Engine(runtime, rows=rows, max_waiting=max(256, 2 * len(schemas)), capacity=limit + 64) as engine:
        streams = [
            engine.submit([PROMPT], max_new_tokens=limit, sampling=[sampling(schema, seed)], mode="none")
            for seed, schema in enumerate(schemas)
        ]
        for schema, stream in zip(schemas, streams, strict=True):
            (generation,) = stream.result()
            found.append(Outcome(schema, generation, fault(schema, generation)))
    return found


def sampling(schema: dict[str, Any], seed: int) -> Sampling:
    outputs = StructuredOutputs(json=schema)
    # A small model repeats items of a list without end; the penalty is what callers have against it.
    return Sampling(temperature=0.7, frequency_penalty=0.3, seed=seed, structured_outputs=outputs)


def fault(schema: dict[str, Any], generation: Generation) -> str | None:
    """Return what is wrong with a text that ended, by another implementation of JSON Schema."""
    if generation.finish_reason == "error":
        return str(generation.error)
    if generation.finish_reason != "stop":
        return None
    try:
        jsonschema_rs.validate(schema, json.loads(generation.text, parse_float=_finite))
    except ValueError as error:  # of either library
        return f"{error}"
    return None


def _finite(text: str) -> float:
    """Return a number of JSON, where it is too large the largest float, since infinity is none."""
    return max(-sys.float_info.max, min(sys.float_info.max, float(text)))


def mask_seconds(runtime: Runtime, found: Sequence[Outcome]) -> tuple[list[float], list[float]]:
    """Return the seconds of each schema, and of each mask, of which nothing is known before.

    The process that compiles a schema first takes as long as this one.
    """
    model = runtime.manifest.model
    grammars = Grammars(runtime.tokenizer, model.vocab_size, model.eos_token_id)
    compiling, masks = [], []
    for outcome in found:
        start = time.thread_time()
        mask = grammars.mask(StructuredOutputs(json=outcome.schema), (), ignore_eos=False)
        compiling.append(time.thread_time() - start)
        for token_id in outcome.generation.token_ids:
            start = time.thread_time()
            mask.allowed()
            mask.append(token_id)
            masks.append(time.thread_time() - start)
    return compiling, masks


def overheads(runtime: Runtime, found: Sequence[Outcome], rows: int, rounds: int) -> list[float]:
    """Return the time of rows with a schema over that of as many tokens without, for the longest texts."""

    def seconds(lengths: int | list[int], sampling: Sampling) -> tuple[float, list[int]]:
        start = time.process_time()
        generations = runtime.generate([PROMPT] * rows, max_new_tokens=lengths, sampling=[sampling] * rows, mode="none")
        return time.process_time() - start, [len(generation.token_ids) for generation in generations]

    ratios = []
    ended = [(outcome, seed) for seed, outcome in enumerate(found) if outcome.finished]
    for outcome, seed in sorted(ended, key=lambda pair: -len(pair[0].generation.token_ids))[:rounds]:
        forced = sampling(outcome.schema, seed)
        free = replace(forced, structured_outputs=None, ignore_eos=True)
        limit = len(outcome.generation.token_ids) + 16
        _, lengths = seconds(limit, forced)
        times = [seconds(lengths, free), seconds(limit, forced), seconds(limit, forced), seconds(lengths, free)]
        if any(counted != lengths for _, counted in times):
            raise RuntimeError("rows of equal settings have other numbers of tokens")
        ratios.append((times[1][0] + times[2][0]) / (times[0][0] + times[3][0]))
    return ratios


def main(
    bundle: Annotated[Path, typer.Argument(help="Bundle directory.")],
    schemas: Annotated[int, typer.Option(min=1, help="Number of schemas.")] = 1000,
    rows: Annotated[int, typer.Option(min=1, help="Rows at once.")] = 8,
    limit: Annotated[int, typer.Option(min=1, help="Tokens of a text.")] = 512,
    rounds: Annotated[int, typer.Option(min=0, help="Of the times with and without a schema.")] = 5,
    seed: Annotated[int, typer.Option(help="Of the schemas.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="Threads.")] = 2,
) -> None:
    """Write JSON for random schemas, validate it, and time the masks."""
    runtime = chameleon_deploy.load(bundle, threads=threads)
    chance = random.Random(seed)
    start = time.perf_counter()
    found = outcomes(runtime, [random_schema(chance) for _ in range(schemas)], rows, limit)
    seconds = time.perf_counter() - start
    tokens = sum(len(outcome.generation.token_ids) for outcome in found)
    finished = [outcome for outcome in found if outcome.finished]
    faults = [outcome for outcome in found if outcome.fault]
    for outcome in faults:
        print(f"fault: {outcome.fault}\n  {json.dumps(outcome.schema)}\n  {outcome.generation.text!r}")
    print(f"{schemas} schemas: {len(finished)} texts ended within {limit} tokens, {len(faults)} faults")
    print(f"{tokens} tokens in {seconds:.0f} s, {tokens / seconds:.0f} a second with {rows} rows at once")
    compiling, masks = mask_seconds(runtime, found)
    for name, values in (("compiling", compiling), ("mask of a row and step", masks)):
        middle, high = np.percentile(values, [50, 99]) * 1e3
        print(f"{name}: mean {statistics.fmean(values) * 1e3:.3f} ms, median {middle:.3f}, 99 % {high:.3f}")
    for count in (1, rows):
        ratios = overheads(runtime, found, count, rounds)
        if ratios:
            print(f"{count} rows: time with a schema over that without {statistics.median(ratios):.3f} "
                  f"({min(ratios):.3f} to {max(ratios):.3f})")  # fmt: skip
    if faults:
        raise SystemExit(1)


if __name__ == "__main__":
    console.run(main)

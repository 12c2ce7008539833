"""The table of docs/features.md, and how each feature of it is used."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import chameleon_deploy
from chameleon_deploy import Generate, Sampling, StructuredOutputs
from tests.conftest import REPOSITORY
from tests.shared_data import caller_factors, good_bundle

PAGE = REPOSITORY / "docs" / "features.md"
PROMPTS = [[7, 8, 9, 10, 11] * 4, [300, 2, 41], [250, 17, 88, 163, 9, 30]]
VECTORS = [[float(i == task) for i in range(5)] for task in (0, 3, 0)]
PLAIN: dict[str, Any] = {"seed": 3, "temperature": 8.0}


class Use(NamedTuple):
    """How a feature is used: fields of Generate, Sampling and Adapt, and of a request's body."""

    generate: dict[str, Any] = {}  # noqa: RUF012
    sampling: dict[str, Any] = {}  # noqa: RUF012
    adapt: dict[str, Any] = {}  # noqa: RUF012
    body: dict[str, Any] | None = None  # those of the others where it is None
    bundle: str = "chameleon_masked"


@cache
def uses() -> dict[str, list[Use]]:
    runtime = chameleon_deploy.load(good_bundle("chameleon_masked"), threads=1, mode="centroid")
    model, plain = runtime.manifest.model, runtime.generate(PROMPTS[:1], Generate(8, [Sampling(**PLAIN)]))[0]
    found = {
        "modes none, centroid, request, cohort": [
            Use(adapt={"mode": mode}) for mode in ("none", "centroid", "request", "cohort")
        ],
        "mode tenant": [Use(adapt={"mode": "tenant", "tenants": ["a", "b", "a"]}, body={"mode": "tenant"})],
        "factors of a caller": [
            Use(adapt={"mode": "static", "factors": caller_factors(2, model)}, body={"mode": "static"})
        ],
        "named adapters": [Use(adapt={"adapters": ["own"] * 3}, body={"model": "bundle:own"}, bundle="adapters")],
        "blended adapters": [Use(adapt={"adapters": [{"own": 0.5}, {}, {"own": -1.5}]}, bundle="adapters")],
        "activated adapters": [Use(adapt={"adapters": ["own"] * 3}, body={"model": "bundle:own"}, bundle="activated")],
        "vectors of a caller": [Use(adapt={"conditioning": VECTORS}, bundle="chameleon_given")],
        "a description of the task": [
            Use(adapt={"adapt_text": text}, bundle="chameleon_given")
            for text in ("answer like a lawyer", ["write code", "answer like a lawyer", "write code"])
        ],
        "embed the first tokens only": [Use(adapt={"mode": "request", "adapt_tokens": 3})],
        "a limit of new tokens": [Use(generate={"max_new_tokens": 5}, body={"max_tokens": 5})],
        "a limit per prompt": [Use(generate={"max_new_tokens": [5, 2, 7]}, body={"max_tokens": [5, 2, 7]})],
        "several continuations": [Use(generate={"n": 3}, body={"n": 3})],
        "a deadline": [Use(generate={"deadline": 1e-9})],
        "prompt lookup": [Use(generate={"prompt_lookup_num_tokens": 4})],
        "prompt lookup in int8": [Use(generate={"prompt_lookup_num_tokens": 4}, bundle="int8")],
        "a salt of the prefix cache": [Use(generate={"cache_salt": "mine"})],
        "only what is bitwise equal from the prefix cache": [Use(generate={"cache_generated": False})],
    }
    settings = {
        "temperature": 0.5, "top_k": 3, "top_p": 0.5, "repetition_penalty": 1.4, "presence_penalty": 1.5,
        "frequency_penalty": -1.5, "logit_bias": {plain.token_ids[1]: -100.0, 9: 4.0}, "stop": [plain.text[1], "in"],
        "stop_token_ids": list(range(40)), "ignore_eos": True, "logprobs": 2,
        "structured_outputs": StructuredOutputs(regex="[a-z]{2,3}"),
    }  # fmt: skip
    fields = {row["field"]: name for name, row in table().items()}
    return found | {fields[name]: [Use(sampling={name: value})] for name, value in settings.items()}


def table() -> dict[str, dict[str, str]]:
    """Return the cells of the page by feature and column."""
    lines = [
        line.strip("|").split("|")
        for line in PAGE.read_text().partition("## Chat")[0].splitlines()
        if line.startswith("|")
    ]
    header, _, *rows = [[cell.strip() for cell in line] for line in lines]
    return {row[0]: dict(zip(header, (cell.strip("`") for cell in row), strict=True)) for row in rows}

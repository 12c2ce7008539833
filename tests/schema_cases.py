"""Questions to a server that its OpenAPI schema makes.

CHAMELEON_SCHEMA_CASES=2000 asks as many; a run of the suite asks a few.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.specs.openapi.checks import response_schema_conformance

from tests.serving import Running

CASES = int(os.environ.get("CHAMELEON_SCHEMA_CASES", "200"))
ERROR_FIELDS = {"message", "type", "param", "code"}


def error_shape(context: Any, response: Any, case: Any) -> None:
    """Every error has the stated shape."""
    if response.status_code >= 400:
        body = response.json()
        assert set(body) == {"error"} and set(body["error"]) == ERROR_FIELDS, body


CHECKS = [schemathesis.checks.not_a_server_error, response_schema_conformance, error_shape]


def operations_of(server: Running) -> list[Any]:
    schema: Any = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    return [found.ok() for found in schema.get_all_operations()]


def asked(operations: list[Any], change: Callable[[Any], None] | None = None) -> list[int]:
    """Ask operations as their schemas say, and return the statuses of the answers.

    change  what is done to every second body
    """
    found: list[int] = []

    def ask(case: Any) -> None:
        if isinstance(case.body, dict):  # a longer answer shows nothing more
            for name in ("max_tokens", "max_completion_tokens"):
                if case.body.get(name) or case.operation.path == "/v1/chat/completions":
                    case.body[name] = min(case.body.get(name) or 3, 3)
            if change is not None and len(found) % 2:
                change(case.body)
        response = case.call(timeout=60)
        case.validate_response(response, checks=CHECKS)
        found.append(response.status_code)

    for operation in operations:
        as_test(operation, ask)()
    assert len(found) >= CASES // 4 * sum(operation.method == "post" for operation in operations)
    return found


def as_test(operation: Any, ask: Any) -> Any:
    each = CASES // 4 if operation.method == "post" else CASES // 20
    limits = settings(
        max_examples=each,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    return limits(given(case=operation.as_strategy())(lambda case: ask(case)))

"""/openapi.json, generated from the table of operations and the types of their bodies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from chameleon_deploy import __version__
from chameleon_deploy.serve import schemas
from chameleon_deploy.serve.chat import complete_chat
from chameleon_deploy.serve.completions import complete
from chameleon_deploy.serve.operations import OPERATIONS, Operation
from chameleon_deploy.serve.responses import respond

_ERRORS = {
    "400": "A field is not valid or cannot be honoured.",
    "401": "The API key is missing or unknown.",
    "404": "No such model.",
    "413": "The body is too large.",
    "422": "A token id is outside the vocabulary.",
    "429": "Too many requests: see Retry-After.",
    "500": "The server failed.",
    "503": "The server is loading or draining.",
}


def document(operations: Sequence[Operation] = OPERATIONS) -> dict[str, Any]:
    """The document of a server that has these operations."""
    bodies = dict.fromkeys(t for o in operations for t in (o.body, o.response) if t)
    types = (*bodies, schemas.Model, schemas.Health, schemas.Version, schemas.ErrorBody)  # fmt: skip
    references, components = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    reference = dict(zip(types, references, strict=True))
    paths: dict[str, Any] = {}
    for o in operations:
        paths.setdefault(o.path, {})[o.method.lower()] = _operation(o, reference)
    paths["/v1/models/{model}"] = {"get": _answer("One model.", reference[schemas.Model], reference, _MODEL)}
    paths["/health"] = {"get": _answer("Whether requests can be taken.", reference[schemas.Health], reference)}
    paths["/version"] = {"get": _answer("Versions and the bundle.", reference[schemas.Version], reference)}
    security = {"type": "http", "scheme": "bearer"}
    return {
        "openapi": "3.1.0",
        "info": {"title": "chameleon-deploy", "version": __version__},
        "paths": paths,
        "components": {"schemas": components, "securitySchemes": {"key": security}},
        "security": [{"key": []}, {}],
    }


_MODEL = [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}]


def _operation(operation: Operation, reference: dict[Any, Any]) -> dict[str, Any]:
    found = _answer(operation.summary, reference[operation.response], reference)
    if operation.body is not None:
        body = {"application/json": {"schema": reference[operation.body]}}
        found["requestBody"] = {"required": True, "content": body}
    if operation.handler in (complete, complete_chat, respond):
        found["responses"]["200"]["content"]["text/event-stream"] = {}
    return found


def _answer(summary: str, schema: Any, reference: dict[Any, Any], parameters: Any = ()) -> dict[str, Any]:
    error = {"application/json": {"schema": reference[schemas.ErrorBody]}}
    return {
        "summary": summary,
        "parameters": list(parameters),
        "responses": {
            "200": {"description": summary, "content": {"application/json": {"schema": schema}}},
            **{status: {"description": text, "content": error} for status, text in _ERRORS.items()},
        },
    }

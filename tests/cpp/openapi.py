"""The schema of chameleon-server, a part of the Python server's: `python -m tests.cpp.openapi` writes its file."""

from __future__ import annotations

import json
from pathlib import Path

from chameleon_deploy.serve.openapi import document
from chameleon_deploy.serve.operations import OPERATIONS

FILE = Path(__file__).parents[2] / "runtime" / "serve" / "openapi.json"
PATHS = {
    "/v1/completions", "/v1/models", "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/tokenize", "/detokenize",
    "/tokenizer_info",
}  # fmt: skip


def text() -> str:
    return json.dumps(document([operation for operation in OPERATIONS if operation.path in PATHS]), indent=1) + "\n"


if __name__ == "__main__":
    FILE.write_text(text())

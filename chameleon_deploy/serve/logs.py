"""One log line per request, with its id; never a prompt unless that was asked for."""

from __future__ import annotations

import json
import logging
import re
import sys
import time
import uuid
from collections.abc import Sequence
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from chameleon_deploy.runtime.engine.iteration import FinishedRow

_log = logging.getLogger("chameleon_deploy.serve")
_FIELDS = ("request_id", "method", "path", "status", "seconds", "adapters", "prompt_tokens", "new_tokens", "queued",
           "first_token", "body")  # fmt: skip
_SHOWN = ("seconds", "request_id", "adapters", "prompt_tokens", "new_tokens", "queued", "first_token", "body")
_ID = re.compile(rb"[\w.:-]{1,128}")


class RequestLog:
    """Gives every request its id, the client's own where it sends one, and logs it when it has ended."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id, status, started = _request_id(scope), 0, time.perf_counter()
        scope.setdefault("state", {})["request_id"] = request_id

        async def identified(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            await self._app(scope, receive, identified)
        finally:
            values = {
                "request_id": request_id, "method": scope["method"], "path": scope["path"], "status": status,
                "seconds": round(time.perf_counter() - started, 4), "body": scope["state"].get("body"),
                **_generated(scope["state"].get("rows") or ()),
            }  # fmt: skip
            extra = {name: value for name, value in values.items() if value is not None}
            _log.info("%s %s %s", scope["method"], scope["path"], status, extra=extra)


def _generated(rows: Sequence[FinishedRow]) -> dict[str, Any]:
    """What is logged of the rows of a request: sums of tokens, and the longest waiting and time to a first token."""
    if not rows:
        return {}
    queued = [row.queued for row in rows if row.queued is not None]
    first = [row.first_token for row in rows if row.first_token is not None]
    return {
        "adapters": sorted({name for row in rows for name in row.adapters}) or None,
        "prompt_tokens": sum(row.prompt_tokens for row in rows),
        "new_tokens": sum(row.new_tokens for row in rows),
        "queued": round(max(queued), 4) if queued else None,
        "first_token": round(max(first), 4) if first else None,
    }


def configure(as_json: bool) -> None:
    """Log to standard error, uvicorn's messages too: one line each, or one JSON object each."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if as_json else _LineFormatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)


class JsonFormatter(logging.Formatter):
    """A record as one JSON object."""

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": self.formatTime(record),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **{name: getattr(record, name) for name in _FIELDS if hasattr(record, name)},
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields)


# Control characters, and what some readers take for the end of a line, so that no request can forge a line.
_ESCAPES = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if code != ord("\n")} | {
    code: f"\\u{code:04x}" for code in (0x2028, 0x2029)
}


class _LineFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields = (f" {name}={getattr(record, name)!r}" for name in _SHOWN if hasattr(record, name))
        message = record.getMessage().translate(_ESCAPES | {ord("\n"): "\\n"})
        once = logging.makeLogRecord({**vars(record), "msg": message, "args": (), "exc_info": None, "exc_text": None})
        line = super().format(once) + "".join(fields)
        if record.exc_info:  # no line of a trace begins as a record does
            line += "\n    " + self.formatException(record.exc_info).translate(_ESCAPES).replace("\n", "\n    ")
        return line


def _request_id(scope: Scope) -> str:
    given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
    return given.decode() if _ID.fullmatch(given) else uuid.uuid4().hex

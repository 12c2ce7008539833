"""What is logged of a request, and the id that it gets. Without a server."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Sequence
from typing import Any

import pytest

from chameleon_deploy.runtime.engine.iteration import FinishedRow
from chameleon_deploy.serve import logs
from chameleon_deploy.serve.logs import JsonFormatter, RequestLog, configure

HEADERS = [(b"accept", b"*/*"), (b"x-request-id", b"mine-1"), (b"host", b"a")]


def row(**fields: Any) -> FinishedRow:
    return FinishedRow("none", 0, "length", prompt_tokens=3, new_tokens=2, seconds=0.5, **fields)


def asked(headers: Sequence[tuple[bytes, bytes]] = HEADERS, fails: bool = False, **state: Any) -> list[Any]:
    """Return what is sent of the answer to a request in whose course the state is set."""
    sent = list[Any]()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        scope["state"].update(state)
        if fails:
            raise ConnectionResetError
        await send({"type": "http.response.start", "status": 201, "headers": [(b"a", b"b")]})
        await send({"type": "http.response.body", "body": b"x"})

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/score", "headers": headers}
    asyncio.run(RequestLog(app)(scope, None, send))  # type: ignore[arg-type]
    return sent


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO)
    return caplog


def fields_of(log: pytest.LogCaptureFixture) -> dict[str, Any]:
    (record,) = log.records
    assert record.getMessage().startswith("POST /v1/score ")
    return {name: value for name, value in vars(record).items() if name in logs._FIELDS}


def test_a_request_has_its_clients_id_and_one_line(log: pytest.LogCaptureFixture, monkeypatch: Any) -> None:
    clock = iter([100.0, 100.123456])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    start, body = asked()
    assert start["headers"] == [(b"a", b"b"), (b"x-request-id", b"mine-1")]
    assert body == {"type": "http.response.body", "body": b"x"}
    assert fields_of(log) == {
        "request_id": "mine-1", "method": "POST", "path": "/v1/score", "status": 201, "seconds": 0.1235,
    }  # fmt: skip


def test_a_request_that_fails_is_logged_without_a_status(log: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ConnectionResetError):
        asked(fails=True)
    assert fields_of(log)["status"] == 0


@pytest.mark.parametrize("given", [b"", b"two words", b"x" * 129, b"line\nbreak", b"caf\xc3\xa9"])
def test_an_id_that_could_forge_a_line_is_replaced(log: pytest.LogCaptureFixture, given: bytes) -> None:
    headers = [(b"x-request-id", given)] if given else [(b"other", b"mine-1")]
    ids = [dict(asked(headers)[0]["headers"])[b"x-request-id"] for _ in range(2)]
    assert ids[0] != ids[1]
    assert all(len(found) == 32 and int(found, 16) for found in ids)


def test_the_longest_id_is_kept(log: pytest.LogCaptureFixture) -> None:
    given = b"a.B:c-_" + b"7" * 121
    assert dict(asked([(b"x-request-id", given)])[0]["headers"])[b"x-request-id"] == given


def test_other_connections_are_not_logged(log: pytest.LogCaptureFixture) -> None:
    seen = list[Any]()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope)

    asyncio.run(RequestLog(app)({"type": "lifespan"}, None, None))  # type: ignore[arg-type]
    assert seen == [{"type": "lifespan"}]
    assert not log.records


def test_rows_are_summed_and_the_slowest_is_told(log: pytest.LogCaptureFixture) -> None:
    rows = [
        row(adapters=("legal",), queued=0.123456, first_token=1.5),
        row(adapters=("code", "legal"), queued=0.1, first_token=1.654321),
        row(),
    ]
    asked(rows=rows, body="what was asked")
    found = fields_of(log)
    assert found["adapters"] == ["code", "legal"]
    assert (found["prompt_tokens"], found["new_tokens"]) == (9, 6)
    assert (found["queued"], found["first_token"]) == (0.1235, 1.6543)
    assert found["body"] == "what was asked"


def test_what_no_row_has_is_not_logged(log: pytest.LogCaptureFixture) -> None:
    asked(rows=[row()])
    assert fields_of(log).keys() == {
        "request_id", "method", "path", "status", "seconds", "prompt_tokens", "new_tokens",
    }  # fmt: skip


@pytest.mark.parametrize("as_json", [False, True])
def test_it_logs_to_standard_error(as_json: bool, capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers = [logging.NullHandler()]
    try:
        configure(as_json)
        (handler,) = root.handlers
        logging.getLogger("uvicorn").info("started", extra={"status": 7, "seconds": 0.5})
        logging.getLogger("uvicorn").debug("not this")
    finally:
        root.handlers = handlers
        root.setLevel(level)
    assert isinstance(handler, logging.StreamHandler)
    shown = capsys.readouterr().err
    if as_json:
        entry = json.loads(shown)
        assert entry.pop("time")
        assert entry == {"level": "info", "message": "started", "status": 7, "seconds": 0.5}
    else:
        assert shown.endswith(" INFO started seconds=0.5\n")
        assert shown.count("\n") == 1


def test_an_exception_is_a_field_of_json() -> None:
    record = logging.LogRecord("a", logging.ERROR, "", 0, "failed", (), None)
    assert "exception" not in json.loads(JsonFormatter().format(record))
    error = ValueError("wrong")
    record.exc_info = (ValueError, error, None)
    assert json.loads(JsonFormatter().format(record))["exception"] == "ValueError: wrong"


@pytest.mark.parametrize(
    ("character", "shown"),
    [
        ("\x00", "\\x00"), ("\x1f", "\\x1f"), (" ", " "), ("~", "~"), ("\x7f", "\\x7f"), ("\x9f", "\\x9f"),
        ("\xa0", "\xa0"), ("\n", "\\n"), ("\u2027", "\u2027"), ("\u2028", "\\u2028"), ("\u2029", "\\u2029"),
    ],
)  # fmt: skip
def test_which_characters_are_escaped(character: str, shown: str) -> None:
    record = logging.LogRecord("a", logging.INFO, "", 0, f"<{character}>", (), None)
    assert logs._LineFormatter("%(message)s").format(record) == f"<{shown}>"

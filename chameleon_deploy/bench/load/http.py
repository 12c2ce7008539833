"""Any OpenAI-style server as a target: POST /v1/completions as server-sent events.

The client is asyncio's streams and nothing else, since it shares the processor with the server that it measures: an
event costs a line that is read and one JSON decoder, about half of what it costs with httpx (0.07 against 0.17 ms).
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator
from urllib.parse import urlsplit

import msgspec

from chameleon_deploy.bench.load.requests import Request
from chameleon_deploy.bench.load.traffic import Record, Steps
from chameleon_deploy.errors import InputError

MAX_ERROR_BYTES = 2_000


class ResponseError(Exception):
    """The server refused a request, or ended it early."""


class _Choice(msgspec.Struct):
    text: str = ""
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    completion_tokens: int = 0


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: msgspec.Raw = msgspec.Raw()


class _Body(msgspec.Struct):
    model: str | None
    prompt: str | list[int]
    max_tokens: int
    temperature: float
    stream: bool = True
    stream_options: dict[str, bool] = msgspec.field(default_factory=lambda: {"include_usage": True})
    ignore_eos: bool = True


_decode = msgspec.json.Decoder(_Event).decode


class HttpTarget:
    """A server.

    url      as http://127.0.0.1:8000, with a prefix before /v1 where there is one
    api_key  sent as a bearer token
    """

    def __init__(self, url: str, api_key: str | None = None, temperature: float = 0.0) -> None:
        """Parse the address. Raises InputError if it is not a URL."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError(f"{url!r} is not the address of a server: pass one as http://127.0.0.1:8000")
        self._host, self._tls = parts.hostname, parts.scheme == "https"
        self._port = parts.port or (443 if self._tls else 80)
        self._prefix = parts.path.rstrip("/").removesuffix("/v1")
        self._headers = f"Host: {parts.netloc.rpartition('@')[2]}\r\nConnection: close\r\n"
        if api_key:
            self._headers += f"Authorization: Bearer {api_key}\r\n"
        self._temperature = temperature
        self._models: list[str] = []  # of the server, the default first; empty before `open`
        self._seen = Steps()  # all, when last looked at

    async def open(self) -> None:
        """Ask for the name of the first model, the target of requests that name none.

        Raises InputError if the server does not answer.
        """
        try:
            body = await self._get("/v1/models")
            self._models = [model["id"] for model in msgspec.json.decode(body)["data"]]
            if not self._models:
                raise LookupError("the list is empty")
        except (OSError, ResponseError, asyncio.IncompleteReadError, msgspec.DecodeError, LookupError) as error:
            raise InputError(f"{self._host}:{self._port} gives no list of models at /v1/models: {error}") from error
        await self.steps()

    def model_of(self, mode: str | None) -> str:
        """Return this project's name of the model in an adaptation mode; a server without it has its first model."""
        named = f"{self._models[0]}:{mode}"
        return named if named in self._models else self._models[0]

    async def complete(self, record: Record) -> None:
        ended = False
        async for data in self._events(record.request):
            if data == b"[DONE]":
                ended = True
                break
            event = _decode(data)
            if event.error:
                raise ResponseError(bytes(event.error).decode("utf-8", "replace"))
            if event.choices and (event.choices[0].text or event.choices[0].finish_reason is None):
                record.arrivals.append(time.perf_counter())
            if event.usage is not None:
                record.new_tokens = event.usage.completion_tokens
        if not ended:
            raise ResponseError("the stream ended without [DONE]")

    async def steps(self) -> Steps | None:
        """Return the figures of /metrics that are this project's; other servers do not have them."""
        try:
            metrics = (await self._get("/metrics")).decode("utf-8", "replace")
        except (OSError, ResponseError, asyncio.IncompleteReadError):
            return None
        names = ("batch_rows_count", "batch_rows_sum", "step_seconds_sum", "prefill_seconds_sum")
        count, rows, *seconds = (_metric(metrics, f"chameleon_{name}") for name in names)
        if count is None or rows is None:
            return None
        before, self._seen = self._seen, Steps(int(count), int(rows), sum(filter(None, seconds)))
        return self._seen.since(before)

    async def _events(self, request: Request) -> AsyncIterator[bytes]:
        body = _Body(
            request.model or next(iter(self._models), None), request.prompt, request.max_tokens, self._temperature
        )
        async for line in self._request("POST", "/v1/completions", msgspec.json.encode(body)):
            if line.startswith(b"data:"):
                yield line[5:].strip()

    async def _get(self, path: str) -> bytes:
        return b"\n".join([line async for line in self._request("GET", path)])

    async def _request(self, method: str, path: str, body: bytes = b"") -> AsyncIterator[bytes]:
        """Yield the lines of the response's body.

        Raises ResponseError for any status but 200.
        """
        reader, writer = await asyncio.open_connection(self._host, self._port, ssl=self._tls or None, limit=2**20)
        try:
            head = f"{method} {self._prefix}{path} HTTP/1.1\r\n{self._headers}"
            if body:
                head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
            writer.write(f"{head}\r\n".encode() + body)
            response = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            status = response.split("\r\n", 1)[0].split(" ")[1]
            parts = _chunks(reader) if re.search(r"(?i)\r\ntransfer-encoding: *chunked", response) else _rest(reader)
            if status != "200":
                text = b"".join([part async for part in parts])[:MAX_ERROR_BYTES]
                raise ResponseError(f"status {status}: {text.decode('utf-8', 'replace')}")
            async for line in _lines(parts):
                yield line
        finally:
            writer.close()


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
        yield (await reader.readexactly(size + 2))[:-2]


async def _rest(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while part := await reader.read(2**16):
        yield part


async def _lines(parts: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    rest = b""
    async for part in parts:
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            yield line
    if rest:
        yield rest


def _metric(text: str, name: str) -> float | None:
    found = re.search(rf"^{name}(?:\{{[^}}]*\}})? (\S+)", text, re.MULTILINE)
    return float(found[1]) if found else None

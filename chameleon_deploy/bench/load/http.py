"""Any OpenAI-style server as a target: POST /v1/completions as server-sent events."""

from __future__ import annotations

import asyncio
import re
from urllib.parse import urlsplit

import msgspec

from chameleon_deploy.bench.load.requests import Request
from chameleon_deploy.bench.load.response import DONE, Parts, Response, ResponseError, body, events
from chameleon_deploy.bench.load.traffic import Record, Steps
from chameleon_deploy.errors import InputError


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
        except (OSError, ResponseError, msgspec.DecodeError, LookupError) as error:
            raise InputError(f"{self._host}:{self._port} gives no list of models at /v1/models: {error}") from error
        await self.steps()

    def model_of(self, mode: str | None) -> str:
        """Return this project's name of the model in an adaptation mode; a server without it has its first model."""
        named = f"{self._models[0]}:{mode}"
        return named if named in self._models else self._models[0]

    async def complete(self, record: Record) -> None:
        for at, data in events(body(await self._post(record.request))):
            if data == DONE:
                return
            event = _decode(data)
            if event.error:
                raise ResponseError(bytes(event.error).decode("utf-8", "replace"))
            if event.choices and (event.choices[0].text or event.choices[0].finish_reason is None):
                record.arrivals.append(at)
            if event.usage is not None:
                record.new_tokens = event.usage.completion_tokens
        raise ResponseError("the stream ended without [DONE]")

    async def steps(self) -> Steps | None:
        """Return the figures of /metrics that are this project's; other servers do not have them."""
        try:
            metrics = (await self._get("/metrics")).decode("utf-8", "replace")
        except (OSError, ResponseError):
            return None
        names = ("batch_rows_count", "batch_rows_sum", "step_seconds_sum", "prefill_seconds_sum")
        count, rows, *seconds = (_metric(metrics, f"chameleon_{name}") for name in names)
        if count is None or rows is None:
            return None
        before, self._seen = self._seen, Steps(int(count), int(rows), sum(filter(None, seconds)))
        return self._seen.since(before)

    async def _post(self, request: Request) -> Parts:
        asked = _Body(
            request.model or next(iter(self._models), None), request.prompt, request.max_tokens, self._temperature
        )
        return await self._exchange("POST", "/v1/completions", msgspec.json.encode(asked))

    async def _get(self, path: str) -> bytes:
        return b"".join(part for _, part in body(await self._exchange("GET", path)))

    async def _exchange(self, method: str, path: str, content: bytes = b"") -> Parts:
        loop = asyncio.get_running_loop()
        transport, response = await loop.create_connection(Response, self._host, self._port, ssl=self._tls or None)
        try:
            head = f"{method} {self._prefix}{path} HTTP/1.1\r\n{self._headers}"
            if content:
                head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n"
            transport.write(f"{head}\r\n".encode() + content)
            await response.end()
        finally:
            transport.close()
        return response.parts


def _metric(text: str, name: str) -> float | None:
    found = re.search(rf"^{name}(?:\{{[^}}]*\}})? (\S+)", text, re.MULTILINE)
    return float(found[1]) if found else None

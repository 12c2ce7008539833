"""A stub of the server in a thread: completions, chat, models, clusters, adapt, metrics and a page.

It invents its tokens, and waits in the middle of them and fails when it is told to.
"""

from __future__ import annotations

import json
import select
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

HIDDEN = 8
TYPES = {".html": "text/html; charset=utf-8", ".js": "text/javascript", ".css": "text/css"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; base-uri 'none'"
)


class CompletionServer(ThreadingHTTPServer):
    """What it was asked, and how it is to behave.

    bodies    of all completions that were asked for
    gone      how many streams their readers left
    hold_at   tokens after which each stream waits for go_on; 0 never
    fail      every so manieth completion is refused; 0 refuses none
    break_at  tokens after which a stream ends without its end; 0 never
    api_key   asked for in every request; "" asks for none
    files     directory of the page
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.bodies: list[dict[str, Any]] = []
        self.gone = 0
        self.hold_at, self.fail, self.break_at, self.api_key = 0, 0, 0, ""
        self.go_on = threading.Event()
        self.files: Path | None = None
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def serve() -> Iterator[CompletionServer]:
    server = CompletionServer()
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


_ADAPTERS = "".join(
    f'chameleon_adapter_{name}{{adapter="{adapter}"}} {value}\n'
    for adapter, values in {"code": (3, 12, 0.3, 3, 0.03, 3), "(others)": (9, 40, 0, 0, 0, 0)}.items()
    for name, value in zip(
        ("requests_total", "generation_tokens_total", "time_to_first_token_seconds_sum",
         "time_to_first_token_seconds_count", "request_queue_time_seconds_sum", "request_queue_time_seconds_count"),
        values, strict=True,
    )
)  # fmt: skip


def centroids() -> list[list[float]]:
    return [[float(i == j) for j in range(HIDDEN)] for i in range(4)]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: CompletionServer

    def do_GET(self) -> None:
        answers: dict[str, Any] = {
            "/v1/models": {"object": "list", "data": [
                {"id": "stub", "mode": "centroid"}, {"id": "stub:none", "mode": "none"},
                {"id": "stub:centroid", "mode": "centroid"}]},
            "/v1/clusters": {"object": "list", "data": [
                {"id": i, "size": 10 + i, "centroid": centroid} for i, centroid in enumerate(centroids())]},
        }  # fmt: skip
        if self.path.startswith("/v1/") and not self._is_allowed():
            self._error(401, "the API key is missing or wrong")
        elif self.path == "/metrics":
            done = len(self.server.bodies)
            text = _METRICS.format(tokens=100 * done, sum=4 * done, count=done) + (_ADAPTERS if done else "")
            self._send(200, text.encode(), "text/plain")
        elif self.path in answers:
            self._json(200, answers[self.path])
        elif self.server.files is not None:
            self._file(self.server.files / (self.path.lstrip("/") or "index.html"))
        else:
            self._error(404, "no such address")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._is_allowed():
            self._error(401, "the API key is missing or wrong")
        elif self.path in ("/v1/completions", "/v1/chat/completions"):
            self.server.bodies.append(body)
            failed = self.server.fail and len(self.server.bodies) % self.server.fail == 0
            self._error(429, "the queue is full") if failed else self._complete(body)
        elif self.path == "/v1/adapt":
            self._json(200, _adapted(body["input"]))
        else:
            self._error(404, "no such address")

    def _is_allowed(self) -> bool:
        return not self.server.api_key or self.headers.get("Authorization") == f"Bearer {self.server.api_key}"

    def _complete(self, body: dict[str, Any]) -> None:
        choices = _chat_choices(body) if "messages" in body else _choices(body)
        if not body.get("stream"):
            self._json(200, _whole(choices))
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.close_connection = True
        try:
            for i, choice in enumerate(choices):
                if i == self.server.break_at > 0:
                    return
                if i == self.server.hold_at > 0:
                    self._hold()
                self._event({"choices": [choice]})
            if (body.get("stream_options") or {}).get("include_usage"):
                cached = {"cached_tokens": 48}
                usage = {"completion_tokens": len(choices), "prompt_tokens_details": cached}
                self._event({"choices": [], "usage": usage})
            self._chunk(b"data: [DONE]\n\n")
            self._chunk(b"")
        except OSError:
            self.server.gone += 1

    def _hold(self) -> None:
        """Wait until the stream may go on. Raises ConnectionError where its reader leaves, who sends nothing else."""
        while not self.server.go_on.wait(0.02):
            if select.select([self.connection], [], [], 0)[0]:
                raise ConnectionError

    def _event(self, event: dict[str, Any]) -> None:
        self._chunk(b"data: " + json.dumps({"model": "stub", **event}).encode() + b"\n\n")

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))

    def _file(self, path: Path) -> None:
        if path.is_file():
            self._send(200, path.read_bytes(), TYPES[path.suffix])
        else:
            self._error(404, f"no {path.name}")

    def _error(self, status: int, message: str) -> None:
        self._json(status, {"error": {"message": message, "type": "error", "param": None, "code": f"code_{status}"}})

    def _json(self, status: int, content: Any) -> None:
        self._send(status, json.dumps(content).encode(), "application/json")

    def _send(self, status: int, content: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Security-Policy", POLICY)
        self.send_header("Connection", "close")  # so that a server that has ended is gone
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  (the base's name)
        pass


_METRICS = """\
chameleon_num_requests_running 3.0
chameleon_num_requests_waiting 2.0
chameleon_generation_tokens_total {tokens}
chameleon_batch_rows_sum {sum}
chameleon_batch_rows_count {count}
chameleon_step_seconds_sum {count}
chameleon_prefill_seconds_sum 0.5
"""


def _choices(body: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one choice per token of a completion."""
    choices = []
    for i in range(body["max_tokens"]):
        text = f" word{i}"
        choice = _choice(i == body["max_tokens"] - 1 and "length", len(body["prompt"]))
        choice |= {"text": text, "logprobs": None}
        if body.get("logprobs") is not None:
            alternatives = dict(_alternatives(text, i))
            choice["logprobs"] = {"tokens": [text], "token_logprobs": [alternatives[text]],
                                  "top_logprobs": [alternatives], "text_offset": [0]}  # fmt: skip
        choices.append(choice)
    return choices


def _chat_choices(body: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one choice per token of an answer, which begins with the model's name.

    With tools it ends with a call, of which two tokens are written, unless it follows a result.
    """
    messages = body["messages"]
    texts = [body["model"], *(f" word{i}" for i in range(1, body.get("max_tokens", 4)))]
    is_call = bool(body.get("tools")) and messages[-1]["role"] == "user"
    choices = [{**_choice(False, len(messages)), "delta": {"role": "assistant", "content": ""}, "logprobs": None}]
    for i, text in enumerate([*texts, "{call", "}"] if is_call else texts):
        choice = _choice(False, len(messages)) | {"delta": {"content": text} if i < len(texts) else {}}
        (_, logprob), *others = _alternatives(text, i)
        top = [{"token": name, "logprob": value, "bytes": None} for name, value in [(text, logprob), *others]]
        entry = {"token": text, "logprob": logprob, "bytes": None, "top_logprobs": top}
        choices.append({**choice, "logprobs": {"content": [entry], "refusal": None}})
    if is_call:
        function = {"name": body["tools"][0]["function"]["name"], "arguments": '{"place": "Rome"}'}
        call = {"index": 0, "id": f"call{len(messages)}", "type": "function", "function": function}
        choices[-1]["delta"] = {"tool_calls": [call]}
    choices[-1]["finish_reason"] = "tool_calls" if is_call else "stop"
    return choices


def _choice(finish_reason: Any, length: int) -> dict[str, Any]:
    adaptation = {"mode": "centroid", "cluster_id": length % 4, "cohort": None}
    return {"index": 0, "finish_reason": finish_reason or None, "chameleon": adaptation}


def _alternatives(text: str, place: int) -> list[tuple[str, float]]:
    return [(text, -0.1 - place % 7), *((f" other{k}", -2.0 - k) for k in range(4))]


def _whole(choices: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the answer that is no stream."""
    last = choices[-1]
    if "text" in last:
        return {"object": "text_completion", "choices": [last | {"text": "".join(each["text"] for each in choices)}]}
    content = "".join(each["delta"].get("content", "") for each in choices)
    message = {"role": "assistant", "content": content, "tool_calls": last["delta"].get("tool_calls")}
    return {"object": "chat.completion", "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}


def _adapted(text: str) -> dict[str, Any]:
    nearest = len(text) % 4
    embedding = [0.1 + 0.8 * (i == nearest) for i in range(HIDDEN)]
    distances = [sum((a - b) ** 2 for a, b in zip(embedding, centroid, strict=True)) ** 0.5 for centroid in centroids()]
    return {"object": "list", "data": [{"index": 0, "embedding": embedding, "cluster_id": nearest,
                                        "distances": distances}]}  # fmt: skip

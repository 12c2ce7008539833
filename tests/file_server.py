"""Files over HTTP, as object storage gives them: with ranges or without, whole or cut off."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class FileHandler(SimpleHTTPRequestHandler):
    """Files over HTTP with ranges. Records the first byte of every GET; `cut` bytes end a connection."""

    ranges = True
    cut: int | None = None
    starts: list[tuple[str, int]]

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        content, asked = path.read_bytes(), re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first, last = 0, len(content) - 1
        if asked and self.ranges:
            first, last = int(asked[1]), min(int(asked[2] or last), last)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        else:
            self.send_response(200)
        self.starts.append((path.name, first))
        self.send_header("Content-Length", str(last - first + 1))
        self.end_headers()
        if self.cut is not None and last >= self.cut:
            self.wfile.write(content[first : max(first, self.cut)])
            self.close_connection = True
        else:
            self.wfile.write(content[first : last + 1])

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass


@contextmanager
def served(directory: Path, **settings: Any) -> Iterator[tuple[str, type[FileHandler]]]:
    handler = type("Handler", (FileHandler,), {"starts": [], **settings})
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(directory)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/wiki", handler
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

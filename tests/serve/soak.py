"""Memory of the server over many requests: `python -m tests.serve.soak BUNDLE [--requests 100000]`.

16 clients on kept connections send tiny requests. Prints one line of JSON with the server's resident memory after each
tenth. The exit code is 1 where it grows by 2 % or more from the first to the last.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import threading
import time
from pathlib import Path

from tests.runtime.soak import resident_mib
from tests.serving import process

CLIENTS = 16
PARTS = 10
MAX_GROWTH = 0.02


def growth(memory: list[float]) -> float:
    """Growth from the first tenth to the last: 0.01 is 1 %."""
    return memory[-1] / memory[0] - 1


def body(number: int) -> bytes:
    return json.dumps(
        {
            "prompt": [1 + (31 * number + 5 * i) % 319 for i in range(1 + number % 24)],
            "mode": ("none", "centroid", "request")[number % 3],
            "max_tokens": 1 + number % 6,
            "temperature": number // 2 % 2,
            "seed": number,
            "n": 1 + (number % 3 == 0),
        }
    ).encode()


async def send(port: int, requests: int, process_id: int) -> list[float]:
    """Send the requests.  -> resident MiB of the server after each tenth, without pages of files"""
    numbers, memory = iter(range(requests)), list[float]()

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for number in numbers:
            sent = body(number)
            head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {len(sent)}\r\n"
            writer.write(head.encode() + b"Content-Type: application/json\r\n\r\n" + sent)
            status, *fields = (await reader.readuntil(b"\r\n\r\n")).decode().lower().split("\r\n")
            length = next(int(field.partition(":")[2]) for field in fields if field.startswith("content-length:"))
            answer = await reader.readexactly(length)
            if " 200 " not in status:
                raise RuntimeError(f"request {number}: {status}: {answer.decode()}")
            if (number + 1) * PARTS // requests > number * PARTS // requests:
                memory.append(resident_mib(process_id))
        writer.close()

    async with asyncio.TaskGroup() as group:
        for _ in range(CLIENTS):
            group.create_task(client())
    return memory


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--requests", type=int, default=100_000)
    arguments = parser.parse_args()
    with process(arguments.bundle) as (server, url):
        assert server.stderr
        threading.Thread(target=server.stderr.read, daemon=True).start()  # else it would fill the pipe
        start = time.perf_counter()
        memory = asyncio.run(send(int(url.rpartition(":")[2]), arguments.requests, server.pid))
        seconds = time.perf_counter() - start
    found = growth(memory)
    print(json.dumps({"requests": arguments.requests, "seconds": seconds, "resident_mib": memory, "growth": found}))
    return found >= MAX_GROWTH


if __name__ == "__main__":
    sys.exit(main())

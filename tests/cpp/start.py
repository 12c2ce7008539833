"""Start and memory of chameleon-server: `python -m tests.cpp.start BUNDLE [--rounds N]`.

Seconds from the start of the process to a healthy server, beside the load of the Python engine in a new process, in
turns; and resident memory as a share of the bundle's files, healthy and after 8 rows of 80 prompt and 32 new tokens.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import httpx

from chameleon_deploy.contract.bundle import open_bundle
from tests.cpp.c_interface import BUILD
from tests.ports import free_port

LOAD = """
import sys, time
start = time.perf_counter()
import chameleon_deploy
engine = chameleon_deploy.Engine(chameleon_deploy.load(sys.argv[1], threads=2))
print(time.perf_counter() - start)
engine.close()
"""


def python_load(bundle: Path) -> float:
    return float(subprocess.run([sys.executable, "-c", LOAD, bundle], check=True, capture_output=True).stdout)


def server_start(bundle: Path) -> tuple[float, int, int]:
    """Return seconds to health, and resident bytes then and after some requests."""
    port = free_port()
    command = [str(BUILD / "chameleon-server"), str(bundle), "--port", str(port), "--threads", "2"]
    start = time.perf_counter()
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
            while not is_healthy(client):
                time.sleep(0.005)
            seconds, healthy = time.perf_counter() - start, resident(process.pid)
            ids = [[100 + 7 * i + row for i in range(80)] for row in range(8)]
            body = {"prompt": ids, "max_tokens": 32, "temperature": 0, "ignore_eos": True}
            client.post("/v1/completions", json=body).raise_for_status()
            after = resident(process.pid)
        process.terminate()
    return seconds, healthy, after


def is_healthy(client: httpx.Client) -> bool:
    try:
        return client.get("/health").is_success
    except httpx.ConnectError:
        return False


def resident(process_id: int) -> int:
    found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{process_id}/status").read_text())
    assert found
    return 1024 * int(found[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    size = sum(file.size for file in open_bundle(arguments.bundle).manifest.files.values())
    rounds = [(server_start(arguments.bundle), python_load(arguments.bundle)) for _ in range(arguments.rounds + 1)][1:]
    print(
        json.dumps(
            {
                "seconds_to_health": median(server[0] for server, _ in rounds),
                "ratio_to_python_load": median(server[0] / load for server, load in rounds),
                "resident_to_files_healthy": median(server[1] for server, _ in rounds) / size,
                "resident_to_files_after_requests": median(server[2] for server, _ in rounds) / size,
            }
        )
    )


if __name__ == "__main__":
    main()

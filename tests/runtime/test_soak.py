"""The soak: it finds each fault that it is for, and none where there is none."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

from tests.runtime.soak import Opening, Service, engine_service, evicting_service, serial_answers, soak
from tests.shared_data import good_bundle

THREADS, REQUESTS = 4, 2000
SERIAL = [[str(number)] for number in range(5)]


def answer(number: int) -> list[str]:
    return [str(number)]


def faults(opening: Opening) -> list[str]:
    return list(soak(opening, SERIAL, THREADS, REQUESTS).faults())


def test_nothing_is_found_in_a_service_that_answers() -> None:
    assert faults(lambda: nullcontext(answer)) == []


def test_an_answer_that_differs_once_is_found() -> None:
    count = itertools.count(1)
    assert faults(lambda: nullcontext(lambda number: ["?"] if next(count) == 1500 else answer(number))) == [
        "1 answers differ from the serial ones"
    ]


def test_memory_that_grows_is_found() -> None:
    @contextmanager
    def opening() -> Iterator[Service]:
        kept = list[bytes]()

        def remember(number: int) -> list[str]:
            kept.append(b"x" * 100_000)  # 100 MB in the second half
            return answer(number)

        yield remember

    assert any("over the second half" in fault for fault in faults(opening))


def test_what_is_left_over_is_found() -> None:
    ended, files, memory = threading.Event(), list[int](), list[bytes]()

    def opening() -> AbstractContextManager[Service]:
        threading.Thread(target=ended.wait).start()
        files.append(os.open(os.devnull, os.O_RDONLY))
        memory.append(b"x" * 50_000_000)
        return nullcontext(answer)

    try:
        found = faults(opening)
    finally:
        ended.set()
        for file in files:
            os.close(file)
    assert [" ".join(fault.split(" after close")[0].split()[1:]) for fault in found] == ["threads", "open files", "MiB"]


def test_tiny_requests_are_answered_as_serial_ones() -> None:
    bundle = good_bundle("chameleon_masked")
    serial = serial_answers(bundle, 100)
    assert len({tuple(texts) for texts in serial}) > 20
    report = soak(partial(engine_service, bundle, 100), serial, threads=16, requests=500)
    assert report.wrong == 0
    assert (report.after.threads, report.after.files) == (report.before.threads, report.before.files)


def test_evictions_lose_nothing() -> None:
    bundle = good_bundle("chameleon_masked")
    with evicting_service(bundle, 50, blocks=0) as cold:
        serial = [cold(number) for number in range(50)]
    report = soak(partial(evicting_service, bundle, 50), serial, threads=8, requests=300)
    assert report.wrong == 0

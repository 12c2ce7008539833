"""The soak of a server: its requests are answered, and memory that grows is found."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator

import pytest

from tests.serve import soak
from tests.shared_data import good_bundle


@pytest.mark.parametrize(("growth", "code"), [(0.001, 0), (0.003, 1)])  # of each tenth; nine are between the two ends
def test_memory_that_grows_is_found(
    growth: float, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    memory: Iterator[float] = itertools.accumulate(itertools.repeat(1 + growth), lambda mib, factor: mib * factor)
    monkeypatch.setattr(soak, "resident_mib", lambda process_id: next(memory))
    words = ["soak", str(good_bundle("chameleon_masked")), "--requests", "30"]
    monkeypatch.setattr("sys.argv", words)
    assert soak.main() == code
    report = json.loads(capsys.readouterr().out)
    assert report["growth"] == pytest.approx((1 + growth) ** 9 - 1)
    assert len(report["resident_mib"]) == 10

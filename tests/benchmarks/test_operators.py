"""benchmarks/operators.py: the operators of one step are those of the graph."""

from __future__ import annotations

import pytest

from benchmarks import operators
from tests.conftest import Exported


def test_operators_of_a_step_are_counted(exported: Exported, capsys: pytest.CaptureFixture[str]) -> None:
    operators.main(exported("llama", "int8"), batch=2, past=8, steps=3, threads=1)
    lines = [line.replace("│", " ").split() for line in capsys.readouterr().out.splitlines()]
    found = {name: rest for name, *rest in filter(None, lines)}
    assert found["GroupQueryAttention"][0] == "2"
    assert found["MatMulIntegerToFloat"][0] == "9"
    assert float(found["all"][1]) > 0

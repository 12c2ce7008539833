"""Tables in a terminal of any width, in a pipe: no heading and no number is cut, and nothing is markup."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
import termios
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from chameleon_deploy.evaluate.figures import checkpoint_sheets
from chameleon_deploy.terminal.table import UNLIMITED, Sheet, is_number
from chameleon_deploy.verify.gates import Check
from chameleon_deploy.verify.report import check_sheet

WIDTHS = [80, 120, 200, UNLIMITED]
RECORDS = [
    {
        "protocol": protocol, "regime": regime, "parameters": 1_286_656, "loss": 9.6795, "perplexity": 15986.1234,
        "positions": 12_332, "change": -0.3053, "change_interval": (-0.3114, -0.2993) if regime != "base" else None,
        "perplexity_by_cluster": {cluster: 100.1234 * (1 + cluster) for cluster in range(8)},
    }
    for protocol in ("paper", "masked") for regime in ("base", "lora", "chameleon")
]  # fmt: skip
WIDE = Sheet(
    ["", "bundle int8", *(f"x {name}" for name in ("full logits", "one call per cluster", "without LoRA",
     "PyTorch eager fp32", "torch.compile fp32", "CTranslate2 int8", "OpenVINO int8"))],
    [["prefill 8x128 + 33 tokens, 4 clusters", "1234.567 ms/token", *["12.345"] * 7]] * 2,
    "Title [bold] of the table", "caption [peers]",
)  # fmt: skip
CHECKS = check_sheet(
    [
        Check("x10 factors: logits, max abs difference", 1.23e-4, 5e-4, graph="decoder_cpu", note="1234 positions"),
        Check("batch sizes 1, 2, 3, 4, 8, 32, max abs difference", 3.0, 5e-4, graph="decoder", note="worst at 32"),
    ]
)
SHEETS = {
    "bench": [WIDE],
    "checks": [CHECKS],
    "evaluate": checkpoint_sheets(RECORDS, wide=False),
    "evaluate --wide": checkpoint_sheets(RECORDS, wide=True),
    "texts": [Sheet(["cluster", "text"], [["1", "word " * 100], ["2", "x" * 300]])],
}


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        ("1,286,656", True), ("-0.5", True), ("+1254.63% [+902.95, +1729.64]", True), ("12.3 ms/token", True),
        ("", False), ("ok", False), ("<= 0.1", False), ("1234 positions, up to 48 of a text", False),
    ],
)  # fmt: skip
def test_numbers_are_told_from_prose(cell: str, expected: bool) -> None:
    assert is_number(cell) == expected


def drawn(sheet: Sheet, width: int) -> str:
    out = StringIO()
    console = Console(file=out, width=width, markup=False)
    for table in sheet.to_rich(width):
        console.print(table)
    return out.getvalue()


def words(text: str) -> list[str]:
    return re.sub("[\u2500-\u257f]", " ", text).split()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", SHEETS)
def test_nothing_is_cut_and_nothing_is_too_wide(name: str, width: int) -> None:
    for sheet in SHEETS[name]:
        text = drawn(sheet, width)
        assert max(map(len, text.splitlines())) <= width
        assert "\u2026" not in text
        found = words(text)
        for cell in [*sheet.headers, *(cell for row in sheet.rows for cell in row)]:
            for word in cell.split():
                assert word in found or len(word) > 24, word
        joined = " ".join(found)
        for row in sheet.rows:
            for cell in row:
                assert cell in joined or not cell[:1].isdigit(), cell  # numbers stay on one line, with their units


@pytest.mark.parametrize("width", [80, 120])
def test_columns_that_do_not_fit_follow_with_their_rows_names(width: int) -> None:
    text = drawn(WIDE, width)
    assert text.count("prefill") == 2 * text.count("\u250f")
    assert text.count("Title [bold] of the table") == text.count("caption [peers]") == 1


def test_evaluate_fits_80_columns_with_clusters_as_rows() -> None:
    figures, clusters = SHEETS["evaluate"]
    assert drawn(figures, 80).count("\u250f") == drawn(clusters, 120).count("\u250f") == 1
    assert [row[0] for row in clusters.rows] == [f"cluster {cluster}" for cluster in range(8)]
    (wide,) = SHEETS["evaluate --wide"]
    assert set(wide.headers) >= {"loss", "positions", "cluster 7"}
    assert all(len(row) == len(wide.headers) for row in wide.rows)


def test_long_words_are_folded_and_control_characters_shown() -> None:
    text = drawn(Sheet(["path", "n"], [["x" * 300, "1"], ["bell\x07", "2"]]), 80)
    assert text.count("x") == 300
    assert "bell\ufffd" in text


def test_a_missed_check_stands_out() -> None:
    assert CHECKS.marked == [1]
    (table,) = CHECKS.to_rich()
    assert [row.style for row in table.rows] == [None, "bold red"]


@pytest.mark.parametrize("columns", [80, 120, 200, None])
def test_a_command_in_a_terminal_and_in_a_pipe(bundle: Path, tmp_path: Path, columns: int | None) -> None:
    """The real command, in a pseudo-terminal of this width or in a pipe."""
    (tmp_path / "texts.jsonl").write_text(json.dumps({"text": "The river [peers] runs. " * 4}) + "\n")
    command = [sys.executable, "-m", "chameleon_deploy.score", str(bundle), "--text", str(tmp_path / "texts.jsonl")]
    printed = in_terminal(command, columns) if columns else subprocess.run(command, capture_output=True, text=True,
                                                                          check=True).stdout  # fmt: skip
    for word in ("cluster", "tokens", "log-probability", "perplexity", "[peers]"):
        assert word in printed
    assert max(map(len, printed.splitlines())) <= (columns or 160)


def in_terminal(command: list[str], columns: int) -> str:
    parent, child = pty.openpty()
    termios.tcsetwinsize(child, (50, columns))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    process = subprocess.Popen(command, stdout=child, stderr=subprocess.DEVNULL, env=environment | {"TERM": "dumb"})
    os.close(child)
    output = b""
    try:
        while piece := os.read(parent, 65536):
            output += piece
    except OSError:  # the terminal's other end was closed
        pass
    os.close(parent)
    assert process.wait() == 0
    return output.decode().replace("\r\n", "\n")

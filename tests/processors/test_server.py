"""One request over HTTP."""

from __future__ import annotations

from pathlib import Path

import chameleon_deploy
from tests.serving import running


def test_a_completion_is_what_the_runtime_gives(recorded: Path) -> None:
    expected = chameleon_deploy.load(recorded / "fp32", threads=1).generate(
        ["The river"], max_new_tokens=4, mode="centroid"
    )
    with running(recorded / "fp32") as server:
        answer = server.post("/v1/completions", model=server.name, prompt="The river", max_tokens=4, temperature=0)
    assert answer.status_code == 200
    assert answer.json()["choices"][0]["text"] == expected[0].text

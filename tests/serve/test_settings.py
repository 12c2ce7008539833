"""The options of the server: declared once, checked before anything is loaded."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from chameleon_deploy.serve.settings import Settings, converted, table
from tests.commands import run
from tests.conftest import REPOSITORY


def test_the_page_has_the_table() -> None:
    assert "\n".join(["", *table(), ""]) in (REPOSITORY / "docs" / "serving.md").read_text()


@pytest.mark.parametrize(
    "wrong", [{"prefill_tokens": 7}, {"rows": 0}, {"rows": 70_000}, {"capacity": 0}, {"threads": 5000},
              {"max_step_seconds": 0}, {"max_waiting": "x"}, {"log_prompts": 3}]
)  # fmt: skip
def test_what_is_out_of_range_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(msgspec.ValidationError, match=next(iter(wrong))):
        converted({"bundle": "x", **wrong})


def test_text_becomes_numbers_and_paths() -> None:
    found = converted({"bundle": "x", "prefill_tokens": "8", "capacity": "40", "log_prompts": "true"})
    defaults = Settings(found.bundle)
    assert (found.prefill_tokens, found.capacity, found.log_prompts) == (8, 40, True)
    assert converted({"bundle": "x"}) == defaults


def test_the_command_refuses_it_before_it_loads_the_bundle() -> None:
    refused = run("chameleon_deploy.serve", "nowhere", "--prefill-tokens", "1")
    assert refused.returncode == 2
    assert "'--prefill-tokens': Input should be greater than or equal to 8" in refused.stderr
    assert "--prefill-tokens" not in run("chameleon_deploy.serve", "nowhere", "--prefill-tokens", "8").stderr

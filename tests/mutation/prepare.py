"""What `tests.mutation.trial` makes before it forks: the session's checkpoints and bundles, of what tests use."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize("name", ["mini", "mini_lora", "llama", "bundle", "lora_bundle", "llama_bundle"])
def test_prepare(name: str, request: pytest.FixtureRequest) -> None:
    assert request.getfixturevalue(name)

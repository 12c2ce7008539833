"""What `tests.mutation.trial` makes before it forks: checkpoints, bundles and runtimes that tests use."""

from __future__ import annotations

import pytest
import torch

torch.set_num_threads(1)  # a fork has none but its own thread


@pytest.mark.parametrize(
    "name",
    ["mini", "mini_lora", "llama", "bundle", "lora_bundle", "llama_bundle", "runtime", "lora_runtime"],
)
def test_prepare(name: str, request: pytest.FixtureRequest) -> None:
    assert request.getfixturevalue(name)

"""The cases of tests/data/text_to_lora, which the authors' program wrote (tests/make_text_to_lora.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tests.shared_data import DATA

SIZE = 6  # of a task's vector
VECTORS = (np.random.default_rng(1).normal(size=(3, SIZE)) * 2).astype(np.float32)
# Options of each case that differ from those of a plain network, and the order of its module types.
CASES: dict[str, dict[str, Any]] = {
    "trained": {},
    "offset": {"mt_lora_path": "mt_lora"},
    "shared": {"shared_AB_head": True},
    "recon": {"training_task": "recon", "shared_AB_head": True},
}
ORDERS = {
    "trained": ("v_proj", "q_proj"),
    "offset": ("q_proj", "down_proj"),
    "shared": ("v_proj", "down_proj", "k_proj"),
    "recon": ("q_proj",),
}


def case_directory(name: str) -> Path:
    return DATA / "text_to_lora" / name


def example_ids(task: int) -> list[int]:
    """The text that the case `trained` learned under a vector, as token ids."""
    return [(5 + 7 * task + (3 + task) * i * i) % 97 for i in range(24)]

"""PyTorch with PEFT's mixed batches: `generate(adapter_names=...)` on one model that has all adapters."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import torch

from chameleon_deploy.bench.peers import Rows
from chameleon_deploy.bench.peers.pytorch import generate
from chameleon_deploy.bench.timing import Lap
from chameleon_deploy.reference.model import Trunk


class Peft:
    """PEFT in float32. See `Peer`."""

    name, precision = "PyTorch with PEFT", "fp32"
    adapts = scores = generates = True

    def __init__(self, trunk: Trunk, directories: Mapping[str, Path], adapters: Sequence[str | None]) -> None:
        """Load the adapters into a copy of the base model, whose layers PEFT replaces.

        adapters  of the rows
        """
        (first, *others) = directories
        model = copy.deepcopy(trunk.causal_lm)
        self._model: Any = peft.PeftModel.from_pretrained(model, directories[first], adapter_name=first).eval()
        for name in others:
            self._model.load_adapter(directories[name], name)
        self._names = [name or "__base__" for name in adapters]

    @torch.no_grad()
    def score(self, rows: Rows) -> Any:
        input_ids = torch.tensor(rows)
        logits = self._model(input_ids, use_cache=False, adapter_names=self._names).logits
        return logits[:, :-1].log_softmax(-1).gather(2, input_ids[:, 1:, None])[..., 0].numpy()

    @torch.no_grad()
    def generate(self, rows: Rows, num_tokens: int, lap: Lap) -> Any:
        return generate(self._model, torch.tensor(rows), num_tokens, lap, adapter_names=self._names)

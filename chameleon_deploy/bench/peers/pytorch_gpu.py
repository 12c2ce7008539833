"""PyTorch on a GPU, with a plain decoding loop in the bundle's precision.

It is eager with a growing cache, or compiled with a static one, whose steps torch.compile records as CUDA graphs. As in
serving, the ids of each step are copied to the host.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from chameleon_deploy.bench.peers import ADAPT, DECODE, PREFILL, Rows
from chameleon_deploy.bench.peers.adapted import AdaptedLayers
from chameleon_deploy.bench.timing import Lap
from chameleon_deploy.contract.bundle import INTEGERS, LM_HEAD, Mode
from chameleon_deploy.reference import inference
from chameleon_deploy.reference.checkpoint import Checkpoint

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16} | dict.fromkeys(("fp16", *INTEGERS), torch.float16)


class PyTorchGPU:
    """PyTorch on a GPU. See `Peer`. An int8 or int4 bundle is compared with float16: PyTorch has no such kernels for
    this model.
    """

    adapts = generates = True

    def __init__(self, checkpoint: Checkpoint, mode: Mode, precision: str, device: str, compiled: bool) -> None:
        self.precision = "fp16" if precision in INTEGERS else precision
        self.name = f"{'torch.compile' if compiled else 'PyTorch eager'} {self.precision}"
        self.scores = not compiled  # for one shape, compiling would take longer than it saves
        self._checkpoint, self._mode, self._device, self._dtype = checkpoint, mode, device, DTYPES[precision]
        self._model: Any = copy.deepcopy(checkpoint.trunk.causal_lm).to(device, self._dtype)
        self._layers = AdaptedLayers(self._model, checkpoint)
        self._caches: dict[tuple[int, ...], StaticCache] | None = {} if compiled else None
        self._step = torch.compile(self._logits, mode="reduce-overhead", dynamic=False) if compiled else self._logits

    def score(self, rows: Rows) -> Any:
        ids = self._adapt(rows)
        logits = self._logits(ids)
        return logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0].cpu().numpy()

    def generate(self, rows: Rows, num_tokens: int, lap: Lap) -> Any:
        ids = self._adapt(rows)
        lap(ADAPT)
        cache = self._cache(len(rows), ids.shape[1] + num_tokens)
        token_ids = self._logits(ids, cache)[:, -1:].argmax(-1)
        chosen = [token_ids.cpu().numpy()]
        lap(PREFILL)
        for _ in range(num_tokens - 1):
            token_ids = self._step(token_ids, cache).argmax(-1)
            chosen.append(token_ids.cpu().numpy())
        lap(DECODE)
        return np.concatenate(chosen, axis=1)

    @torch.no_grad()
    def _logits(self, input_ids: Tensor, cache: Any = None) -> Tensor:
        """Return float32 [batch, sequence, vocab]; after a whole prompt with a cache, of the last position only."""
        output = self._model.base_model(input_ids, past_key_values=cache, use_cache=cache is not None)
        hidden = output.last_hidden_state if cache is None else output.last_hidden_state[:, -1:]
        logits: Tensor = self._model.get_submodule(LM_HEAD)(hidden)
        return logits.float()

    def _adapt(self, rows: Rows) -> Tensor:
        adaptation = inference.adapt(self._checkpoint, rows, self._mode)
        placed = {name: factor.to(self._device, self._dtype) for name, factor in adaptation.factors.items()}
        self._layers.set_factors(replace(adaptation, factors=placed, factor_ids=adaptation.factor_ids.to(self._device)))
        return torch.tensor(rows).to(self._device)

    def _cache(self, batch: int, length: int) -> Any:
        if self._caches is None:
            return DynamicCache()
        if (batch, length) not in self._caches:  # kept, since compiled steps hold its addresses
            self._caches[batch, length] = StaticCache(config=self._model.config, max_cache_len=length)
        cache = self._caches[batch, length]
        cache.reset()
        return cache

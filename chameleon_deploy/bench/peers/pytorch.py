"""The PyTorch reference through `transformers`' generate, with the factors added in the head."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, StoppingCriteriaList

from chameleon_deploy.bench.peers import ADAPT, DECODE, PREFILL, Rows
from chameleon_deploy.bench.timing import Lap
from chameleon_deploy.bundle import Mode
from chameleon_deploy.reference import inference
from chameleon_deploy.reference.checkpoint import Checkpoint


class PyTorch:
    """PyTorch. See `Peer`. Every call adapts its batch, as the bundle does."""

    precision: str = "fp32"
    adapts = scores = generates = True

    def __init__(self, checkpoint: Checkpoint, mode: Mode, compiled: bool) -> None:
        self.name = "torch.compile fp32" if compiled else "PyTorch eager fp32"
        self._checkpoint, self._mode = checkpoint, mode
        # A second model that shares the layers: the checkpoint's own keeps its plain head.
        self._model: Any = copy.copy(checkpoint.trunk.causal_lm)
        self._model._modules = dict(self._model._modules)
        self._head = _AdaptedHead(self._model.get_output_embeddings(), checkpoint.config.alpha)
        self._model.set_output_embeddings(self._head)
        if compiled:
            self._model.forward = torch.compile(self._model.forward, dynamic=True)

    @torch.no_grad()
    def score(self, rows: Rows) -> Any:
        input_ids = self._adapt(rows)
        logits = self._model(input_ids, use_cache=False).logits
        return logits[:, :-1].log_softmax(-1).gather(2, input_ids[:, 1:, None])[..., 0].numpy()

    def generate(self, rows: Rows, num_tokens: int, lap: Lap) -> Any:
        input_ids = self._adapt(rows)
        lap(ADAPT)
        width = input_ids.shape[1]

        def after_each_token(so_far: Tensor, scores: Any, **_: Any) -> Tensor:
            if so_far.shape[1] == width + 1:
                lap(PREFILL)
            return torch.zeros(len(so_far), dtype=torch.bool)

        output = self._model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            generation_config=GenerationConfig(
                max_new_tokens=num_tokens, do_sample=False, eos_token_id=None, bos_token_id=None, pad_token_id=0
            ),
            stopping_criteria=StoppingCriteriaList([after_each_token]),
        )
        lap(DECODE)
        return output[:, width:].numpy()

    def _adapt(self, rows: Rows) -> Tensor:
        adaptation = inference.adapt(self._checkpoint, rows, self._mode)
        self._head.lora_A = adaptation.lora_A[adaptation.factor_ids]
        self._head.lora_B = adaptation.lora_B[adaptation.factor_ids]
        return torch.tensor(rows)


class _AdaptedHead(nn.Module):
    """A head with an update per row: lora_A [batch, rank, hidden], lora_B [batch, vocab, rank]."""

    lora_A: Tensor
    lora_B: Tensor

    def __init__(self, linear: nn.Linear, alpha: float) -> None:
        super().__init__()
        self.linear, self.alpha = linear, alpha

    @property
    def weight(self) -> Tensor:
        return self.linear.weight

    def forward(self, hidden: Tensor) -> Tensor:
        update: Tensor = (hidden @ self.lora_A.transpose(1, 2)) @ self.lora_B.transpose(1, 2)
        logits: Tensor = self.linear(hidden) + self.alpha * update
        return logits

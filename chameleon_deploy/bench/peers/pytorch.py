"""The PyTorch reference through `transformers`' generate, with the factors added in its layers; in int8 by torchao."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, StoppingCriteriaList

from chameleon_deploy.bench.peers import ADAPT, DECODE, PREFILL, Rows
from chameleon_deploy.bench.peers.adapted import AdaptedLayers
from chameleon_deploy.bench.timing import Lap
from chameleon_deploy.contract.bundle import Mode
from chameleon_deploy.reference import inference
from chameleon_deploy.reference.checkpoint import Checkpoint


class PyTorch:
    """PyTorch. See `Peer`. Every call adapts its batch, as the bundle does."""

    adapts = scores = generates = True
    is_ablation = False

    def __init__(self, checkpoint: Checkpoint, mode: Mode, compiled: bool, precision: str = "fp32") -> None:
        """Share the checkpoint's weights, or quantise a copy of them with torchao: weights per output channel,
        activations per token.

        Raises ImportError without torchao, ValueError if its layers are not those that torchao quantises.
        """
        self.name, self.precision = f"{'torch.compile' if compiled else 'PyTorch eager'} {precision}", precision
        self._checkpoint, self._mode = checkpoint, mode
        base = checkpoint.trunk.causal_lm
        # A second model that shares the parameters: the checkpoint's own keeps its plain layers.
        self._model: Any = copy.deepcopy(base, {id(parameter): parameter for parameter in base.parameters()})
        if precision == "int8":
            self._model = _quantised(self._model)
        self.size = _bytes(self._model)
        self._layers = AdaptedLayers(self._model, checkpoint)
        if compiled:
            self._model.forward = torch.compile(self._model.forward, dynamic=True)

    @torch.no_grad()
    def logits(self, ids: Sequence[int]) -> Any:
        self._adapt([ids], "none")
        return self._model(torch.tensor([ids]), use_cache=False).logits[0].numpy()

    @torch.no_grad()
    def score(self, rows: Rows) -> Any:
        input_ids = self._adapt(rows)
        logits = self._model(input_ids, use_cache=False).logits
        return logits[:, :-1].log_softmax(-1).gather(2, input_ids[:, 1:, None])[..., 0].numpy()

    def generate(self, rows: Rows, num_tokens: int, lap: Lap) -> Any:
        input_ids = self._adapt(rows)
        lap(ADAPT)
        return generate(self._model, input_ids, num_tokens, lap)

    def _adapt(self, rows: Rows, mode: Mode | None = None) -> Tensor:
        self._layers.set_factors(inference.adapt(self._checkpoint, rows, mode or self._mode))
        return torch.tensor(rows)


def generate(model: Any, input_ids: Tensor, num_tokens: int, lap: Lap, **options: Any) -> Any:
    """Return greedy tokens, int [batch, num_tokens], by `transformers`' generate; no token ends a row.

    model  its generation configuration loses its end of text, which `generate` would fill into the one passed here
    """
    model.generation_config.eos_token_id = None
    width = input_ids.shape[1]

    def after_each_token(so_far: Tensor, scores: Any, **_: Any) -> Tensor:
        if so_far.shape[1] == width + 1:
            lap(PREFILL)
        return torch.zeros(len(so_far), dtype=torch.bool)

    output = model.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        generation_config=GenerationConfig(
            max_new_tokens=num_tokens, do_sample=False, eos_token_id=None, bos_token_id=None, pad_token_id=0
        ),
        stopping_criteria=StoppingCriteriaList([after_each_token]),
        **options,
    )
    lap(DECODE)
    return output[:, width:].numpy()


def _quantised(model: Any) -> Any:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    layers = [layer for layer in model.base_model.modules() if isinstance(layer, nn.Linear)]
    if not layers:
        raise ValueError("its layers are not nn.Linear, which torchao quantises")
    model = copy.deepcopy(model)
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return model


def _bytes(model: Any) -> int:
    """Return the bytes of a model's parameters, those of a quantised one with their scales."""
    sizes = {}
    for parameter in model.parameters():
        inner = parameter.__tensor_flatten__()[0] if hasattr(parameter, "__tensor_flatten__") else []
        tensors = [getattr(parameter, name) for name in inner] or [parameter]
        sizes[id(parameter)] = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return sum(sizes.values())

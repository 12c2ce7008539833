"""OpenVINO with the frozen base model, stateful, so that its plugin fuses attention with its own cache."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from chameleon_deploy.bench.peers import DECODE, PREFILL, Rows
from chameleon_deploy.bench.timing import Lap
from chameleon_deploy.reference.model import Trunk

GROUP = 32  # weights that share a scale in int4
INPUTS = ("input_ids", "attention_mask", "position_ids", "logits_positions")

# The defaults on newer processors are bfloat16 products and an int8 cache.
FLOAT32 = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}


class OpenVINO:
    """OpenVINO. See `Peer`.

    fp32 is float32 throughout. int8 uses NNCF's default weights, INT8_ASYM, int4 INT4_ASYM in groups of 32 with the
    first and last layers in int8, as NNCF does by default. Other settings are OpenVINO's defaults.
    """

    adapts, scores, generates, is_ablation = False, True, True, False

    def __init__(self, trunk: Trunk, precision: str, threads: int, directory: Path) -> None:
        """Convert the model, save it into `directory` and compile it.

        Raises ValueError for a precision other than fp32, int8 and int4, and what OpenVINO raises.
        """
        import openvino

        if precision not in ("fp32", "int8", "int4"):
            raise ValueError(f"no comparison in {precision}")
        self.name, self.precision = f"OpenVINO {precision}", precision
        model = compressed(stateful_model(trunk), precision)
        config: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        if precision == "fp32":
            config |= FLOAT32
        openvino.save_model(model, directory / "openvino.xml", compress_to_fp16=False)
        self.size = sum((directory / f"openvino.{kind}").stat().st_size for kind in ("xml", "bin"))
        core = openvino.Core()
        self._generating: Any = core.compile_model(model, "CPU", config).create_infer_request()
        self._scoring: Any = core.compile_model(_with_log_softmax(model), "CPU", config).create_infer_request()

    def logits(self, ids: Sequence[int]) -> Any:
        return self._infer(self._generating, "logits", np.array([ids]), 0, np.arange(len(ids)))[0].copy()

    def score(self, rows: Rows) -> Any:
        input_ids = np.array(rows)
        logprobs = self._infer(self._scoring, "logprobs", input_ids, 0, np.arange(input_ids.shape[1] - 1))
        return np.take_along_axis(logprobs, input_ids[:, 1:, None], -1)[..., 0]

    def generate(self, rows: Rows, num_tokens: int, lap: Lap) -> Any:
        input_ids = np.array(rows)
        chosen = np.empty((len(rows), num_tokens), np.int64)
        for step in range(num_tokens):
            past = 0 if step == 0 else len(rows[0]) + step - 1
            last = np.array([input_ids.shape[1] - 1])
            logits = self._infer(self._generating, "logits", input_ids, past, last)
            chosen[:, step] = logits[:, 0].argmax(-1)
            input_ids = chosen[:, step : step + 1]
            if step == 0:
                lap(PREFILL)
        lap(DECODE)
        return chosen

    def _infer(self, request: Any, output: str, input_ids: Any, past: int, logits_positions: Any) -> Any:
        """Return the output [batch, positions, vocab] of `input_ids`, which follow `past` tokens."""
        batch, width = input_ids.shape
        if past == 0:
            request.reset_state()
        request.infer(
            {
                "input_ids": input_ids,
                "attention_mask": np.ones((batch, past + width), np.int64),
                "position_ids": np.broadcast_to(np.arange(past, past + width), (batch, width)).copy(),
                "logits_positions": logits_positions,
                "beam_idx": np.arange(batch, dtype=np.int32),
            },
            share_inputs=True,
        )
        return request.get_tensor(output).data


class _WithPast(nn.Module):
    """The causal language model as a function of plain tensors: past keys and values in, present ones out."""

    def __init__(self, causal_lm: Any) -> None:
        super().__init__()
        self.causal_lm = causal_lm

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, logits_positions: Tensor, *past: Tensor
    ) -> tuple[Tensor, ...]:
        cache = DynamicCache()
        for key, value in zip(past[::2], past[1::2], strict=True):
            layer = DynamicLayer()
            layer.lazy_initialization(key, value)
            layer.keys, layer.values = key, value
            cache.layers.append(layer)
        total, width = attention_mask.shape[1], input_ids.shape[1]
        causal = torch.arange(total)[None] <= torch.arange(width)[:, None] + (total - width)
        allowed = causal[None, None] & (attention_mask[:, None, None] > 0)
        hidden = self.causal_lm.base_model(
            input_ids=input_ids,
            attention_mask=torch.where(allowed, 0.0, torch.finfo(torch.float32).min),
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        logits = self.causal_lm.get_output_embeddings()(hidden.index_select(1, logits_positions))
        return logits, *(tensor for layer in cache.layers for tensor in (layer.keys, layer.values))


def compressed(model: Any, precision: str) -> Any:
    """Compress the weights of a model as NNCF does by default in int8 or int4; fp32 stays as it is."""
    if precision == "fp32":
        return model
    import nncf

    nncf.set_log_level(logging.ERROR)
    with redirect_stdout(io.StringIO()):  # the converter draws its own progress there
        mode = nncf.CompressWeightsMode
        groups = {"mode": mode.INT4_ASYM, "group_size": GROUP} if precision == "int4" else {}
        return nncf.compress_weights(model, **groups)


@torch.no_grad()
def stateful_model(trunk: Trunk) -> Any:
    """Convert by tracing, then make keys and values internal state, reordered by `beam_idx` as the plugin expects."""
    import openvino
    from openvino import opset13 as op
    from openvino._offline_transformations import apply_make_stateful_transformation

    config = trunk.config
    heads, dim = trunk.num_key_value_heads, trunk.head_dim
    names = [f"{i}.{kind}" for i in range(config.num_hidden_layers) for kind in ("key", "value")]
    batch, past, width = 2, 5, 3  # of the example; all three stay dynamic
    example = (
        torch.zeros(batch, width, dtype=torch.int64),
        torch.ones(batch, past + width, dtype=torch.int64),
        torch.arange(past, past + width).expand(batch, width),
        torch.arange(width),
        *(torch.zeros(batch, heads, past, dim) for _ in names),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about tracing, which is intended
        model = openvino.convert_model(_WithPast(trunk.causal_lm).eval(), example_input=example)
    for node, name in zip(model.inputs, [*INPUTS, *(f"past.{name}" for name in names)], strict=True):
        node.get_tensor().set_names({name})
        shape = [-1] if name == "logits_positions" else [-1, -1] if name in INPUTS else [-1, heads, -1, dim]
        node.get_node().set_partial_shape(openvino.PartialShape(shape))
    for node, name in zip(model.outputs, ["logits", *(f"present.{name}" for name in names)], strict=True):
        node.get_tensor().set_names({name})
    beam_idx = op.parameter([-1], openvino.Type.i32, name="beam_idx")
    beam_idx.output(0).get_tensor().set_names({"beam_idx"})
    model.add_parameters([beam_idx])
    zero = op.constant(0, dtype=np.int64)
    for name in names:
        node = model.input(f"past.{name}")
        users = node.get_target_inputs()
        reordered = op.gather(node.get_node(), beam_idx, zero)
        for user in users:
            user.replace_source_output(reordered.output(0))
    model.validate_nodes_and_infer_types()
    apply_make_stateful_transformation(model, {f"past.{name}": f"present.{name}" for name in names})
    rows = op.gather(op.shape_of(model.input("input_ids").get_node()), op.constant([0], dtype=np.int64), zero)
    shape = op.concat([rows, *(op.constant([n], dtype=np.int64) for n in (heads, 0, dim))], axis=0)
    for node in model.get_ops():
        if node.get_type_name() == "ReadValue":  # a new state has as many rows as the ids, and no past
            node.set_arguments([op.broadcast(op.constant(0.0, dtype=np.float32), shape).output(0)])
    model.validate_nodes_and_infer_types()
    return model


def _with_log_softmax(model: Any) -> Any:
    """Return a copy that outputs log-probabilities; numpy would compute them on one thread and distort the timing."""
    from openvino import opset13 as op

    scoring = model.clone()
    result = scoring.output("logits").get_node()
    logprobs = op.log_softmax(result.input_value(0), axis=-1)
    logprobs.output(0).get_tensor().set_names({"logprobs"})
    scoring.remove_result(result)
    scoring.add_results([op.result(logprobs)])
    return scoring

"""chooser.onnx and logits_scorer.onnx: results computed from logits that stay on a device.

On a GPU the logits of a step are megabytes, and a caller needs one number per row. These two graphs compute it, so that
nothing else is copied to the host. They have no weights.
"""

from __future__ import annotations

import onnx_ir as ir
from onnxscript import GraphBuilder

from chameleon_deploy.export.graph import FLOAT, INT64, OPSET
from chameleon_deploy.reference.families.spec import DecoderSpec


def build_chooser(model: DecoderSpec) -> ir.Model:
    """Build the graph logits float32 [batch, positions, vocab] -> token_ids int64 [batch, positions].

    It returns the highest logit, ties to the lowest id; -1 if a logit is not finite, which the runtime reports.
    """
    graph, builder = _graph("chooser")
    op = builder.op
    logits = builder.input("logits", FLOAT, ["batch", "positions", model.vocab_size])
    best = op.ArgMax(logits, axis=-1, keepdims=0)
    broken = op.Cast(op.Or(op.IsNaN(logits), op.IsInf(logits)), to=FLOAT)
    is_broken = op.Greater(op.ReduceMax(broken, op.Constant(value_ints=[-1]), keepdims=0), op.Constant(value_float=0.5))
    builder.add_output(op.Where(is_broken, op.Constant(value_int=-1), best), "token_ids")
    return _model(graph, INT64)


def build_logits_scorer(model: DecoderSpec) -> ir.Model:
    """Build the graph logits float32 [batch, positions, vocab], targets int64 [batch, positions] -> logprobs float32
    [batch, positions].

    It returns log softmax(logits)[target], in float32.
    """
    graph, builder = _graph("logits_scorer")
    op = builder.op
    logits = builder.input("logits", FLOAT, ["batch", "positions", model.vocab_size])
    targets = builder.input("targets", INT64, ["batch", "positions"])
    axis = op.Constant(value_ints=[-1])
    chosen = op.GatherElements(op.LogSoftmax(logits, axis=-1), op.Unsqueeze(targets, axis), axis=-1)
    builder.add_output(op.Squeeze(chosen, axis), "logprobs")
    return _model(graph, FLOAT)


def _graph(name: str) -> tuple[ir.Graph, GraphBuilder]:
    graph = ir.Graph([], [], nodes=[], opset_imports={"": OPSET}, name=name)
    return graph, GraphBuilder(graph)


def _model(graph: ir.Graph, dtype: ir.DataType) -> ir.Model:
    graph.outputs[0].shape, graph.outputs[0].type = ir.Shape(["batch", "positions"]), ir.TensorType(dtype)
    return ir.Model(graph, ir_version=10, producer_name="chameleon_deploy")

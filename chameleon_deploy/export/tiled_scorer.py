"""hidden_scorer.onnx: log-probabilities of given tokens from hidden states, one tile of the vocabulary after the other.

The logits of 1,024 positions of GPT-2 are 206 MB, and an update, its sum and a softmax each traverse all of them. The
logits of a tile stay in the processor's cache until they are summed, and only one tile of them exists at a time.

The graph is the head of decoder_cpu.onnx with its matrix in tiles: the same products in the same precision. The matrix
is [vocab, hidden], so a tile is a range of the bytes that are stored already.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnxscript import GraphBuilder

from chameleon_deploy.contract.bundle import LM_HEAD, factor_names
from chameleon_deploy.export.graph import FLOAT, INT64, integer, integers, soft_cap, subgraph, take_nodes
from chameleon_deploy.export.head import FACTOR_IDS, HIDDEN_STATES
from chameleon_deploy.export.weights import rows_of
from chameleon_deploy.reference.families.spec import DecoderSpec

TILE = 2048  # tokens: the logits of 512 positions take 4 MB


def give_hidden_states(decoder: ir.Model, model: DecoderSpec) -> None:
    """Rewrite a decoder in place: hidden states are an output, and logits are computed for some of them.

    hidden_states  float32 [batch, positions, hidden], of logits_positions
    num_logits     int64 [1], how many of them get logits: the first ones
    """
    graph = decoder.graph
    hidden = _value(graph, HIDDEN_STATES)
    takers = list(hidden.uses())
    _declare(hidden, "hidden_states", FLOAT, ["batch", "positions", model.hidden_size])
    num_logits = ir.Value()
    _declare(num_logits, "num_logits", INT64, [1])
    part = subgraph(graph, "head", lambda op: [op.Slice(hidden, integers(op, [0]), num_logits, integers(op, [1]))])
    nodes, (first,) = take_nodes(part)
    graph.insert_after(_producer(hidden), nodes)
    for node, index in takers:
        node.replace_input_with(index, first)
    first.name = HIDDEN_STATES
    graph.inputs.append(num_logits)
    graph.outputs.append(hidden)


def build_tiled_scorer(decoder: ir.Model, model: DecoderSpec) -> ir.Model:
    """Return the scorer that belongs to a decoder.

    Inputs:
        hidden_states   float32 [positions, hidden], of the decoder
        targets         int64 [positions]
        factor_ids      int64 [positions], the factor set of each position; this and the next if the head is a target
        lm_head.lora_A  float32 [factor_sets, rank, hidden]
        lm_head.lora_B  float32 [factor_sets, rank, vocab]
    Outputs:
        logprobs        float32 [positions], log softmax(logits)[target]

    Raises ValueError if the decoder's logits are not Gemm(products, lora_B, base) or base alone, in a Reshape, where
    base is a product, or one with a scale for each row. The model's soft cap may be between.
    """
    reshape = next(value for value in decoder.graph.outputs if value.name == "logits").producer()
    if reshape is None or (logits := reshape.inputs[0]) is None:
        raise ValueError("the decoder's logits do not come from a Reshape")
    if model.logits_cap is not None:  # of each tile
        for _ in range(3):  # the operators of soft_cap
            logits = _first_input(logits)
    names = factor_names(LM_HEAD)
    is_target = names[0] in {value.name for value in decoder.graph.inputs}
    inputs = [_value(decoder.graph, n) for n in (HIDDEN_STATES, *((FACTOR_IDS, *names) if is_target else ()))]
    graph = ir.convenience.extract(decoder.graph, inputs, [logits])
    graph.name = "hidden_scorer"
    for name in sorted(graph.initializers):  # sorted, so that an export always has the same bytes
        graph.initializers[name] = graph.initializers.pop(name)
    _declare(graph.inputs[0], "hidden_states", FLOAT, ["positions", model.hidden_size])
    if is_target:
        _declare(graph.inputs[1], "factor_ids", INT64, ["positions"])
    builder = GraphBuilder(graph)
    targets = builder.input("targets", INT64, ["positions"])
    graph.outputs[0] = _logprobs(builder, targets, model)
    _declare(graph.outputs[0], "logprobs", FLOAT, ["positions"])
    scorer = ir.Model(graph, ir_version=10, producer_name="chameleon_deploy")
    RemoveUnusedNodesPass()(scorer)
    return scorer


def _logprobs(builder: Any, targets: ir.Value, model: DecoderSpec) -> Any:
    """Return log-probabilities in place of a graph's logits [positions, vocab] before their cap."""
    op, vocab_size = builder.op, model.vocab_size
    product, (products, lora_B), row_scale = builder.graph.outputs[0].producer(), (None, None), None
    if product and product.op_type == "Gemm" and len(product.inputs) == 3:
        products, lora_B, base = product.inputs
        product = base.producer()
    if product and product.op_type == "Mul":
        base, row_scale = product.inputs
        product = base.producer()
    if product is None or product.op_type not in ("Gemm", "MatMul", "MatMulIntegerToFloat"):
        raise ValueError("the decoder's logits are not a product and its update")
    attributes = {name: attribute.value for name, attribute in product.attributes.items()}
    sizes = [min(TILE, vocab_size - start) for start in range(0, vocab_size, TILE)]
    parts_of_B: list[Any] = [None] * len(sizes)
    if lora_B is not None:
        split = op.Split(lora_B, integers(op, sizes), axis=1, _outputs=[f"lora_B.{i}" for i in range(len(sizes))])
        parts_of_B = [split] if len(sizes) == 1 else split
    column = integers(op, [1])
    wanted = op.Unsqueeze(targets, column)  # [positions, 1]
    place = op.Mod(wanted, integer(op, TILE))  # inside its tile
    logits_there, logprobs_there = [], []  # [positions, 1] of each tile, at that place
    for i, size in enumerate(sizes):
        tokens = slice(i * TILE, i * TILE + size)
        inputs = [_tile(builder, value, tokens) for value in product.inputs]
        base = getattr(op, product.op_type)(*inputs, _domain=product.domain, **attributes)
        base = base if row_scale is None else op.Mul(base, row_scale)
        logits = base if products is None else op.Gemm(products, parts_of_B[i], base)
        logits = soft_cap(op, logits, model.logits_cap)
        if size < TILE:
            place = op.Min(place, integer(op, size - 1))  # a target of another tile may be beyond the end of this one
        logits_there.append(op.GatherElements(logits, place, axis=1))
        logprobs_there.append(op.GatherElements(op.LogSoftmax(logits, axis=1), place, axis=1))
    there = op.Concat(*logits_there, axis=1)  # [positions, tiles]
    sums = op.Sub(there, op.Concat(*logprobs_there, axis=1))  # log sum exp of each tile
    chosen = op.GatherElements(there, op.Div(wanted, integer(op, TILE)), axis=1)
    return op.Squeeze(op.Sub(chosen, op.ReduceLogSumExp(sums, column)), column)


def _tile(builder: Any, value: ir.Value | None, tokens: slice) -> Any:
    """Return the rows of the matrix, of its transpose or of its scales that belong to some tokens; another value
    unchanged.
    """
    node = value.producer() if value else None
    if node and node.op_type == "Transpose":
        return builder.op.Transpose(_tile(builder, node.inputs[0], tokens), perm=[1, 0])
    if value is None or not isinstance(value.const_value, ir.ExternalTensor):
        return value
    name = f"{value.name}.{tokens.start}"
    return builder.initializer(rows_of(value, name, tokens), name)


def _first_input(value: ir.Value) -> ir.Value:
    if (first := _producer(value).inputs[0]) is None:
        raise ValueError(f"{value.name} is computed from nothing")
    return first


def _producer(value: ir.Value) -> ir.Node:
    if (node := value.producer()) is None:
        raise ValueError(f"no operator gives {value.name}")
    return node


def _value(graph: ir.Graph, name: str) -> ir.Value:
    return ir.convenience.create_value_mapping(graph)[name]


def _declare(value: ir.Value, name: str, dtype: ir.DataType, shape: list[int | str]) -> None:
    value.name, value.type, value.shape = name, ir.TensorType(dtype), ir.Shape(shape)

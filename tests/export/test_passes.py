"""Each pass alone: what it rewrites, what it leaves, what it must not change."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from chameleon_deploy.export.graph import copy_of
from chameleon_deploy.export.int8.cache import quantize_cache
from chameleon_deploy.export.passes.flat_logits import flatten_logits
from chameleon_deploy.export.passes.shared_cache import share_cache
from chameleon_deploy.export.passes.sum_update import sum_update
from chameleon_deploy.export.tiled_scorer import give_hidden_states
from chameleon_deploy.reference.checkpoint import Checkpoint


def test_share_cache_rewrites_every_attention_and_nothing_else(bundle: Path, mini: Checkpoint) -> None:
    decoder = ir.load(bundle / "decoder.onnx")
    before = Counter(node.op_type for node in decoder.graph)
    weights = {name for name, value in decoder.graph.initializers.items() if value.dtype == ir.DataType.FLOAT}
    model = mini.trunk.spec
    assert share_cache(decoder, model) == model.num_layers
    after = Counter(node.op_type for node in decoder.graph)
    assert after["GroupQueryAttention"] == model.num_layers
    for gone in ("Softmax", "And", "LessOrEqual", "Split", "Transpose"):
        assert before[gone]
        assert not after[gone]
    for kept in ("LayerNormalization", "Gelu", "Gemm", "GatherND"):
        assert before[kept] == after[kept]
    kept_weights = {name for name, value in decoder.graph.initializers.items() if value.dtype == ir.DataType.FLOAT}
    assert kept_weights == weights | {"shared_cache.head_sink"}
    names = {value.name for value in decoder.graph.inputs}
    assert "attention_mask" not in names
    assert {"seqlens_k", "total_sequence_length"} <= names


def test_passes_on_a_copy_leave_the_original(bundle: Path, mini: Checkpoint) -> None:
    """A copy shares tensors with its original, and no type: passes change those in place."""
    decoder, model = ir.load(bundle / "decoder.onnx"), mini.trunk.spec
    before = ir.to_proto(decoder).SerializeToString(deterministic=True)
    rewritten = copy_of(decoder)
    share_cache(rewritten, model)
    quantize_cache(rewritten, model, [None] * model.num_layers)
    give_hidden_states(rewritten, model)
    other = copy_of(decoder)
    for value in other.graph.inputs:
        value.dtype = ir.DataType.FLOAT16
    assert ir.to_proto(decoder).SerializeToString(deterministic=True) == before
    assert ir.to_proto(rewritten).SerializeToString(deterministic=True) != before


def test_share_cache_keeps_groups_and_rotary_embedding(llama_bundle: Path, llama: Checkpoint) -> None:
    decoder = ir.load(llama_bundle / "decoder.onnx")
    assert share_cache(decoder, llama.trunk.spec) == 2
    attentions = [node for node in decoder.graph if node.op_type == "GroupQueryAttention"]
    for node in attentions:
        assert {name: node.attributes[name].as_int() for name in ("num_heads", "kv_num_heads", "do_rotary")} == {
            "num_heads": 4, "kv_num_heads": 2, "do_rotary": 1
        }  # fmt: skip
        assert [value.name for value in node.inputs[7:9] if value] == ["rotary_emb.cos", "rotary_emb.sin"]
    counts = Counter(node.op_type for node in decoder.graph)
    for gone in ("Softmax", "And", "Expand", "Transpose"):
        assert not counts[gone] or gone == "Expand"  # the head has two of its own
    assert counts["Expand"] == 2


@pytest.mark.parametrize(("name", "of"), [("bundle", "mini"), ("llama_bundle", "llama")])
def test_quantize_cache_gives_every_attention_two_branches(name: str, of: str, request: pytest.FixtureRequest) -> None:
    decoder = ir.load(request.getfixturevalue(name) / "decoder.onnx")
    model = request.getfixturevalue(of).trunk.spec
    share_cache(decoder, model)
    before = Counter(node.op_type for node in decoder.graph)
    width = model.num_key_value_heads * model.head_dim
    keys = (np.ones(width, np.float32),) * 2 if name == "llama_bundle" else None
    assert quantize_cache(decoder, model, [keys] * model.num_layers) == model.num_layers
    after = Counter(node.op_type for node in decoder.graph)
    assert after - before == Counter(
        If=model.num_layers, Shape=1, Cast=1, Constant=2, Reshape=1, Sub=1, Squeeze=1, Equal=1
    )
    assert before - after == Counter(GroupQueryAttention=model.num_layers)
    for node in decoder.graph:
        if node.op_type == "If":
            step, prompt = (node.attributes[branch].as_graph() for branch in ("then_branch", "else_branch"))
            *before_attention, attention = (inner for inner in step if inner.op_type != "Constant")
            turned = ["Split", "RotaryEmbedding", "Mul", "Split", "Sub"] if keys else []
            assert [inner.op_type for inner in before_attention] == turned
            assert attention.attributes["k_quant_type"].as_string() == "PER_TENSOR"
            assert [value and value.name for value in attention.inputs[-2:]] == ["int8_cache.one"] * 2
            assert Counter(inner.op_type for inner in prompt)["GroupQueryAttention"] == 1
    cached = [
        v
        for v in (*decoder.graph.inputs, *decoder.graph.outputs)
        if v.name and v.name.startswith(("past_", "present."))
    ]
    assert {value.dtype for value in cached} == {ir.DataType.INT8}
    names = [value.name for node in ir.traversal.RecursiveGraphIterator(decoder.graph) for value in node.outputs]
    assert len(names) == len(set(names))


def test_every_variant_uses_the_one_weights_file(bundle: Path) -> None:
    places = {}
    for name in ("decoder", "decoder_cpu"):
        graph = ir.load(bundle / f"{name}.onnx").graph
        external = [v.const_value for v in graph.initializers.values() if isinstance(v.const_value, ir.ExternalTensor)]
        places[name] = {(t.name, t.location, t.offset, t.length) for t in external}
    assert places["decoder"] == places["decoder_cpu"]


def test_the_update_is_summed_and_the_logits_are_flat(bundle: Path, mini: Checkpoint) -> None:
    model = mini.trunk.spec
    decoder = ir.load(bundle / "decoder.onnx")
    reshapes = sum(node.op_type == "Reshape" for node in decoder.graph)
    assert sum_update(decoder) == 1
    assert sum_update(decoder) == 0
    flatten_logits(decoder)
    logits = decoder.graph.outputs[0]
    assert (logits.name, logits.shape) == ("logits", ir.Shape(["batch*positions", model.vocab_size]))
    total = logits.producer()
    assert total is not None
    assert total.op_type == "Add"
    producers = [value.producer() for value in total.inputs if value]
    assert [node.op_type for node in producers if node] == ["Gemm", "Squeeze"]
    assert sum(node.op_type == "Reshape" for node in decoder.graph) == reshapes - 1
    with pytest.raises(ValueError, match="Reshape"):
        flatten_logits(decoder)

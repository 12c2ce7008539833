"""Each pass alone: what it rewrites, what it leaves, what it must not change."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx_ir as ir

from chameleon_deploy.bundle import open_bundle
from chameleon_deploy.export.passes.shared_cache import share_cache


def test_share_cache_rewrites_every_attention_and_nothing_else(bundle: Path) -> None:
    decoder = ir.load(bundle / "decoder.onnx")
    before = Counter(node.op_type for node in decoder.graph)
    weights = {name for name, value in decoder.graph.initializers.items() if value.dtype == ir.DataType.FLOAT}
    model = open_bundle(bundle).manifest.model
    assert share_cache(decoder, model) == model.num_layers
    after = Counter(node.op_type for node in decoder.graph)
    assert after["GroupQueryAttention"] == model.num_layers
    for gone in ("Softmax", "And", "LessOrEqual", "Split", "Transpose"):
        assert before[gone]
        assert not after[gone]
    for kept in ("LayerNormalization", "Gelu", "Gemm", "GatherND"):
        assert before[kept] == after[kept]
    kept_weights = {name for name, value in decoder.graph.initializers.items() if value.dtype == ir.DataType.FLOAT}
    assert kept_weights == weights
    names = {value.name for value in decoder.graph.inputs}
    assert "attention_mask" not in names
    assert {"seqlens_k", "total_sequence_length"} <= names


def test_every_variant_uses_the_one_weights_file(bundle: Path) -> None:
    places = {}
    for name in ("decoder", "decoder_cpu"):
        graph = ir.load(bundle / f"{name}.onnx").graph
        external = [v.const_value for v in graph.initializers.values() if isinstance(v.const_value, ir.ExternalTensor)]
        places[name] = {(t.name, t.location, t.offset, t.length) for t in external}
    assert places["decoder"] == places["decoder_cpu"]

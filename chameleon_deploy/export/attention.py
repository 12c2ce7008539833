"""Causal attention over past and present, with any number of key-value heads.

passes/shared_cache.py uses `attention` as the pattern that it looks for, so that the pass rewrites exactly what is
built.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from chameleon_deploy.export.graph import FLOAT, integer, real, soft_cap
from chameleon_deploy.reference.families.spec import DecoderSpec


def attention_bias(op: Any, past_key: ir.Value, mask: ir.Value, position_ids: ir.Value, window: int | None) -> Any:
    """Return 0 where a query may attend, the lowest float elsewhere: causal, real tokens only, and none `window`
    tokens or more before it. [batch, 1, sequence, total]

    past_key      [batch, key-value heads, past, head_dim]
    mask          int64 [batch, total], 1 where a token is real
    position_ids  int64 [batch, sequence]
    """
    past = op.Squeeze(op.Shape(past_key, start=2, end=3))
    total = op.Add(past, op.Squeeze(op.Shape(position_ids, start=1, end=2)))
    queries = op.Unsqueeze(op.Range(past, total, integer(op, 1)), [1])  # [sequence, 1]
    keys = op.Unsqueeze(op.Range(integer(op, 0), total, integer(op, 1)), [0])  # [1, total]
    allowed = op.And(op.LessOrEqual(keys, queries), op.Cast(op.Unsqueeze(mask, [1, 2]), to=ir.DataType.BOOL))
    if window is not None:
        # Padding may stand between tokens, so a key's position is the number of tokens before it.
        count = op.CumSum(op.Cast(mask, to=FLOAT), integer(op, 1))  # [batch, total], one more than the position
        first = op.Sub(op.Cast(position_ids, to=FLOAT), real(op, window - 2.0))
        near = op.LessOrEqual(op.Unsqueeze(first, [1, 3]), op.Unsqueeze(count, [1, 2]))
        allowed = op.And(allowed, near)
    return op.Where(allowed, real(op, 0.0), real(op, float(np.finfo(np.float32).min)))


def attention(
    op: Any,
    spec: DecoderSpec,
    heads: Sequence[Any],
    past_key: Any,
    past_value: Any,
    bias: Any,
    rotary: Sequence[Any] | None = None,
) -> tuple[Any, Any, Any]:
    """Return the context [batch, sequence, heads * head_dim], and present key and value [batch, key-value heads, total,
    head_dim].

    heads   queries, keys and values [batch, sequence, heads * head_dim] each, or one value of all side by side
    bias    from `attention_bias`
    rotary  cosines and sines [batch, 1, sequence, rotary_dim / 2], by which each new query and key is rotated
    """
    query_heads, key_heads, dim = spec.num_attention_heads, spec.num_key_value_heads, spec.head_dim
    q, k, v = split_heads(op, spec, heads[0]) if len(heads) == 1 else heads
    q, k, v = (_by_head(op, x, n, dim) for x, n in ((q, query_heads), (k, key_heads), (v, key_heads)))
    if rotary:
        q, k = (_rotate(op, x, spec.rotary_dim, dim, *rotary) for x in (q, k))
    k = op.Concat(past_key, k, axis=2)
    v = op.Concat(past_value, v, axis=2)
    keys, values = (_repeat(op, part, query_heads // key_heads, query_heads, dim) for part in (k, v))
    scores = op.MatMul(op.Mul(q, real(op, spec.scale)), op.Transpose(keys, perm=[0, 1, 3, 2]))
    scores = soft_cap(op, scores, spec.attention_cap)
    context = op.MatMul(op.Softmax(op.Add(scores, bias), axis=-1), values)
    return op.Reshape(op.Transpose(context, perm=[0, 2, 1, 3]), [0, 0, query_heads * dim]), k, v


def split_heads(op: Any, spec: DecoderSpec, qkv: Any) -> Any:
    """Return queries, keys and values [batch, sequence, heads * head_dim] of a projection to all three."""
    dim, heads, key_heads = spec.head_dim, spec.num_attention_heads, spec.num_key_value_heads
    if not spec.interleaved:
        return op.Split(qkv, [heads * dim, key_heads * dim, key_heads * dim], axis=2, _outputs=3)
    parts = op.Split(op.Reshape(qkv, [0, 0, heads, 3 * dim]), [dim, dim, dim], axis=3, _outputs=3)
    return [op.Reshape(part, [0, 0, heads * dim]) for part in parts]


def _by_head(op: Any, x: Any, heads: int, dim: int) -> Any:
    return op.Transpose(op.Reshape(x, [0, 0, heads, dim]), perm=[0, 2, 1, 3])


def _rotate(op: Any, x: Any, rotary_dim: int, dim: int, cos: Any, sin: Any) -> Any:
    """Apply the rotary embedding (https://arxiv.org/abs/2104.09864) to the first channels of a head; their halves are
    the two coordinates.
    """
    half, rest = rotary_dim // 2, [dim - rotary_dim] if rotary_dim < dim else []
    a, b, *kept = op.Split(x, [half, half, *rest], axis=3, _outputs=2 + len(rest))
    turned = op.Sub(op.Mul(a, cos), op.Mul(b, sin)), op.Add(op.Mul(b, cos), op.Mul(a, sin))
    return op.Concat(*turned, *kept, axis=3)


def _repeat(op: Any, x: Any, times: int, heads: int, dim: int) -> Any:
    """Repeat each key-value head for every query head of its group (https://arxiv.org/abs/2305.13245)."""
    if times == 1:
        return x
    return op.Reshape(op.Expand(op.Unsqueeze(x, [2]), [1, 1, times, 1, 1]), [0, heads, -1, dim])

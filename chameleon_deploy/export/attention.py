"""Causal attention over past and present, with any number of key-value heads.

passes/shared_cache.py uses `attention` as the pattern that it looks for, so that the pass rewrites exactly what is
built.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from chameleon_deploy.contract.bundle import ModelSpec
from chameleon_deploy.export.graph import integer, real


def attention_bias(op: Any, past_key: Any, input_ids: Any, attention_mask: Any) -> Any:
    """Return 0 where a query may attend, the lowest float elsewhere: causal, real tokens only. [batch, 1, sequence,
    total]
    """
    past = op.Squeeze(op.Shape(past_key, start=2, end=3))
    total = op.Add(past, op.Squeeze(op.Shape(input_ids, start=1, end=2)))
    queries = op.Unsqueeze(op.Range(past, total, integer(op, 1)), [1])  # [sequence, 1]
    keys = op.Unsqueeze(op.Range(integer(op, 0), total, integer(op, 1)), [0])  # [1, total]
    allowed = op.And(op.LessOrEqual(keys, queries), op.Cast(op.Unsqueeze(attention_mask, [1, 2]), to=9))  # to bool
    return op.Where(allowed, real(op, 0.0), real(op, float(np.finfo(np.float32).min)))


def attention(
    op: Any,
    model: ModelSpec,
    qkv: Any,
    past_key: Any,
    past_value: Any,
    bias: Any,
    rotary: tuple[Any, Any] | None = None,
) -> tuple[Any, Any, Any]:
    """Return the context of qkv, and the present key and value.

    qkv [batch, sequence, (heads + 2 * key-value heads) * head_dim] -> context [batch, sequence, heads * head_dim],
    present key and value [batch, key-value heads, total, head_dim]

    bias    from `attention_bias`
    rotary  cosines and sines [batch, 1, sequence, head_dim / 2], by which each new query and key is rotated
    """
    heads, key_heads, dim = model.num_attention_heads, model.num_key_value_heads, model.head_dim
    q, k, v = op.Split(qkv, [heads * dim, key_heads * dim, key_heads * dim], axis=2, _outputs=3)
    q, k, v = _split_heads(op, q, heads, dim), _split_heads(op, k, key_heads, dim), _split_heads(op, v, key_heads, dim)
    if rotary:
        q, k = _rotate(op, q, dim, *rotary), _rotate(op, k, dim, *rotary)
    k = op.Concat(past_key, k, axis=2)
    v = op.Concat(past_value, v, axis=2)
    keys, values = (_repeat(op, part, heads // key_heads, heads, dim) for part in (k, v))
    scores = op.MatMul(op.Mul(q, real(op, dim**-0.5)), op.Transpose(keys, perm=[0, 1, 3, 2]))
    context = op.MatMul(op.Softmax(op.Add(scores, bias), axis=-1), values)
    return op.Reshape(op.Transpose(context, perm=[0, 2, 1, 3]), [0, 0, heads * dim]), k, v


def _split_heads(op: Any, x: Any, heads: int, dim: int) -> Any:
    return op.Transpose(op.Reshape(x, [0, 0, heads, dim]), perm=[0, 2, 1, 3])


def _rotate(op: Any, x: Any, dim: int, cos: Any, sin: Any) -> Any:
    """Apply the rotary embedding (https://arxiv.org/abs/2104.09864); the halves of a head are the two coordinates."""
    a, b = op.Split(x, [dim // 2, dim // 2], axis=3, _outputs=2)
    return op.Concat(op.Sub(op.Mul(a, cos), op.Mul(b, sin)), op.Add(op.Mul(b, cos), op.Mul(a, sin)), axis=3)


def _repeat(op: Any, x: Any, times: int, heads: int, dim: int) -> Any:
    """Repeat each key-value head for every query head of its group (https://arxiv.org/abs/2305.13245)."""
    if times == 1:
        return x
    return op.Reshape(op.Expand(op.Unsqueeze(x, [2]), [1, 1, times, 1, 1]), [0, heads, -1, dim])

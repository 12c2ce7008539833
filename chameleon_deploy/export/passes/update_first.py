"""The head's product added to the update, not the update to the product.

ONNX Runtime's Gemm copies what it adds to and accumulates on the copy. Where that is the update, accumulating happens
inside the large product, block by block; the other way round it is one more pass over all logits.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnxscript.rewriter.pattern import RewriteRule


def update_first(decoder: ir.Model) -> int:
    """Rewrite a float32 decoder in place. Returns how many heads were rewritten: one."""

    def head_first(op: Any, h: Any, weight: Any, products: Any, lora_B: Any) -> Any:
        return op.Gemm(products, lora_B, op.Gemm(h, weight, transB=1))

    def rewritten(op: Any, h: Any, weight: Any, products: Any, lora_B: Any) -> Any:
        return op.Gemm(h, weight, op.Gemm(products, lora_B), transB=1)

    return int(RewriteRule(head_first, rewritten).apply_to_model(decoder))

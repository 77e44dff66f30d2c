"""Patterns that onnxruntime computes as one operator, if their factors are where they were.

Gelu       x * (1 + erf(x / sqrt 2)) * 0.5, the 0.5 before or behind
FastGelu   x * (1 + tanh(...)) * 0.5
LayerNorm  (x - mean) / sqrt(variance + epsilon) * gamma + beta
"""

from __future__ import annotations

import onnx_ir as ir

from quant_core.model import graph


def ends_fusion(value: ir.Value) -> bool:
    """Whether factors and shifts of this tensor belong to the operator that made it."""
    producer = value.producer()
    return producer is not None and (is_gelu(producer) or _is_normalized(producer))


def is_gelu(node: ir.Node) -> bool:
    """Whether the node is a Mul by 1 + erf or 1 + tanh, itself times a constant or not."""
    if node.op_type != "Mul" or node.domain:
        return False
    return any(_is_gate(v) for v in node.inputs if v is not None)


def _is_gate(value: ir.Value) -> bool:
    made = _made_by(value, "Mul")
    if made is not None and any(graph.is_constant(v) for v in made.inputs):
        inner = next((v for v in made.inputs if not graph.is_constant(v)), None)
        return inner is not None and _is_gate(inner)
    added = _made_by(value, "Add")
    if added is None:
        return False
    return any(
        _made_by(v, op_type) is not None for v in added.inputs for op_type in ("Erf", "Tanh")
    )


def _is_normalized(node: ir.Node) -> bool:
    """Whether the node divides by a square root, or multiplies by the reciprocal of one."""
    if node.op_type == "Div":
        return _made_by(node.inputs[1], "Sqrt") is not None
    if node.op_type != "Mul":
        return False
    inverses = (_made_by(v, "Reciprocal") for v in node.inputs)
    return any(r is not None and _made_by(r.inputs[0], "Sqrt") is not None for r in inverses)


def _made_by(value: ir.Value | None, op_type: str) -> ir.Node | None:
    producer = None if value is None else value.producer()
    return producer if producer is not None and producer.op_type == op_type else None

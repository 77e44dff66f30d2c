"""A rounded tensor that several float nodes read, so that onnxruntime dequantizes it once.

When it loads a model, onnxruntime gives each reader of a DequantizeLinear one of its own. They take
as long as what reads them, and what it would merge no longer reads one tensor: a SiLU behind a Conv
of integers stays a Sigmoid and a Mul, a Gelu five operators.

What is written instead:

    DequantizeLinear -> CastLike(1.0) -> Sigmoid, Mul

CastLike is a function of other operators, which onnxruntime writes out after that; what is left is
a Cast of float32 to float32, which hands its buffer on.

Source: onnxruntime 1.32, core/optimizer/ensure_unique_dq_for_node_unit.cc; held by
tests/facts/test_shared_reads.py.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import numpy as np
import onnx_ir as ir

from quant_core.model import graph
from quant_core.plan.operators import Kind, rule_of
from quant_core.rewrite.writer import Writer

OPSET_CAST_LIKE = 15  # the first that has it


def dequantize_once(
    model: ir.Model, writer: Writer, rounded: Iterable[ir.Value], static: Collection[ir.Node]
) -> None:
    """Edit the quantized model in place: float nodes that read a rounded tensor share one copy.

    rounded  what DequantizeLinear nodes give
    static   nodes that compute in integers, and must read it from the DequantizeLinear itself

    Operators that only move values read that too: onnxruntime moves the integers instead. An opset
    that lacks CastLike leaves the model as it is.
    """
    if graph.opset(model) < OPSET_CAST_LIKE:
        return
    number: ir.Value | None = None
    for value in rounded:
        shared = [use for use in value.uses() if _computes_in_float(use.node, model, static)]
        producer = value.producer()
        if len(shared) < 2 or producer is None:
            continue
        number = number or writer.first(model.graph).constant("float", np.array(1, np.float32))
        write = writer.detached()
        copy = write.node("CastLike", [value, number], f"{value.name}_copy")
        model.graph.insert_after(producer, write.waiting)
        for use in shared:
            use.node.replace_input_with(use.idx, copy)


def _computes_in_float(node: ir.Node, model: ir.Model, static: Collection[ir.Node]) -> bool:
    rule = rule_of(node)
    moves = rule is not None and rule.kind is Kind.MOVES
    is_here = node.graph is model.graph and node.op_type != "QuantizeLinear"
    return is_here and not moves and node not in static

"""A product with the transpose of a weight reads the weight itself, whose integers others share."""

from __future__ import annotations

import onnx_ir as ir

from quant_core.model import graph
from quant_core.optimize.applied import Applied
from quant_core.optimize.edit import put_in_place
from quant_core.optimize.facts import Facts


def transposed_weights(model: ir.Model, facts: Facts) -> list[Applied]:
    """What decoders with the weights of their encoder read.

        MatMul(x, Transpose(w))             =>   Gemm<transB = 1>(x, w)
        Gemm<transB = 1>(x, Transpose(w))   =>   Gemm(x, w)

    1. w is a constant matrix.
    2. x is a matrix: a MatMul with more axes has no form that transposes.
    """
    applied = []
    for node in graph.nodes_of(model):
        weight = _transposed(node)
        if weight is None or facts.rank(node.inputs[0]) != 2:  # 2
            continue
        is_straight = node.op_type == "Gemm" and graph.attribute(node, "transB", 0) == 1
        attributes = [a for a in node.attributes.values() if a.name != "transB"]
        attributes.append(ir.AttrInt64("transB", 0 if is_straight else 1))
        inputs = [node.inputs[0], weight, *node.inputs[2:]]
        put_in_place([node], ir.Node("", "Gemm", inputs, attributes, name=node.name))
        applied.append(Applied("transposed_weights", str(node.name), ()))
    return applied


def _transposed(node: ir.Node) -> ir.Value | None:
    """The constant matrix whose transpose the node multiplies by (1)."""
    if node.domain or node.op_type not in ("MatMul", "Gemm"):
        return None
    transpose = graph.value(node.inputs[1]).producer()
    if transpose is None or transpose.domain or transpose.op_type != "Transpose":
        return None
    weight = graph.value(transpose.inputs[0])
    is_matrix = graph.is_float_weight(weight) and len(graph.shape_of(weight)) == 2
    is_turned = tuple(graph.attribute(transpose, "perm", (1, 0))) == (1, 0)
    return weight if is_matrix and is_turned else None

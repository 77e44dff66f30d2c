"""Softmax over one axis without the detour that opset 12 models take after conversion."""

from __future__ import annotations

import onnx_ir as ir

from quant_core.model import graph
from quant_core.optimize.applied import Applied
from quant_core.optimize.edit import remove
from quant_core.optimize.facts import Facts


def plain_softmax(model: ir.Model, facts: Facts) -> list[Applied]:
    """Softmax over the last axis of a tensor that was made a matrix for it.

        x -> Flatten(axis = r - 1) -> Softmax(-1) -> Reshape(Shape(x))   =>   x -> Softmax(-1)

    1. The rank r of x is known, and its last axis alone is the matrix's second.
    2. The Softmax alone reads the matrix, the Reshape alone its result, to the whole shape of x.
    """
    applied = []
    for softmax in graph.nodes_of(model, "Softmax", "LogSoftmax"):
        names = _straighten(softmax, facts)
        if names:
            applied.append(Applied("plain_softmax", str(softmax.name), names))
    return applied


def _straighten(softmax: ir.Node, facts: Facts) -> tuple[str, ...]:
    """The names of the nodes that went, none if the pattern is another."""
    matrix = graph.value(softmax.inputs[0])
    flatten, reshape = matrix.producer(), graph.only_reader(softmax.outputs[0])
    if flatten is None or flatten.op_type != "Flatten" or reshape is None:
        return ()
    x, rank = graph.value(flatten.inputs[0]), facts.rank(flatten.inputs[0])
    last = graph.attribute(softmax, "axis", -1) in (-1, 1)
    if not last or rank is None or graph.attribute(flatten, "axis", 1) not in (rank - 1, -1):  # 1.
        return ()
    if graph.only_reader(matrix) is not softmax or reshape.op_type != "Reshape":  # 2.
        return ()
    shape = graph.value(reshape.inputs[1]).producer()
    if shape is None or shape.op_type != "Shape" or shape.inputs[0] is not x:
        return ()
    if graph.attribute(shape, "start", 0) or graph.attribute(shape, "end", None) is not None:
        return ()
    softmax.replace_input_with(0, x)
    softmax.attributes["axis"] = ir.AttrInt64("axis", -1)
    gone = [flatten, reshape]
    graph.replace_value(reshape.outputs[0], softmax.outputs[0])
    remove(gone)
    return tuple(str(n.name) for n in gone)

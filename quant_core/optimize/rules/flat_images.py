"""Convs over one axis, as those of sound, become Convs over images of one row.

onnxruntime has blocked kernels for images alone.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from quant_core.model import graph
from quant_core.optimize.applied import Applied, Chosen
from quant_core.optimize.edit import constant
from quant_core.optimize.facts import Facts
from quant_core.optimize.parts import (
    PAIRS,
    SAME,
    SPATIAL,
    data_of,
    grown_from,
    has_own_weight,
    set_apart,
)


def flat_images(model: ir.Model, facts: Facts, chosen: Chosen) -> list[Applied]:
    """Every part of the graph that has Convs over one axis gets a second one of one entry.

        x(n, c, t) -> Conv(k) -> Relu -> MaxPool(2) -> y(n, d, u)
        =>   x -> Unsqueeze -> Conv(1 x k) -> Relu -> MaxPool(1 x 2) -> Squeeze -> y

    1. A part starts at a Conv, and grows over operators that compute the same with one axis more.
    2. All tensors of it have three axes; the weight of a Conv is its own.
    3. Where a tensor enters or leaves, an Unsqueeze or a Squeeze moves no number.
    """
    applied = []
    for inside in graph.graphs_of(model):
        seen: set[ir.Node] = set()
        for start in list(inside):
            is_new = start.op_type == "Conv" and start not in seen
            if is_new and chosen(str(start.name)) and _fits(start, facts):
                part = grown_from(start, lambda node: _fits(node, facts))  # 1.
                seen |= part
                _write(inside, part)
                applied.append(Applied("flat_images", str(start.name), ()))
    return applied


def _fits(node: ir.Node, facts: Facts) -> bool:
    """Whether the node can compute on images of one row instead (1. and 2.)."""
    if node.domain or len([v for v in node.outputs if v.name]) != 1:
        return False
    if any(facts.rank(v) != 3 for v in (*data_of(node), node.outputs[0])):
        return False
    if node.op_type == "Conv":
        return has_own_weight(node)
    if node.op_type == "Concat":
        return graph.attribute(node, "axis", 0) in (0, 1)
    return node.op_type in SPATIAL or node.op_type in SAME or node.op_type in PAIRS


def _write(inside: ir.Graph, part: set[ir.Node]) -> None:
    for node in [n for n in inside if n in part]:
        _add_row(node)
    row = constant(inside, "row", np.array([2]))

    def enter(value: ir.Value) -> ir.Node:
        return ir.Node("", "Unsqueeze", [value, row])

    def leave(value: ir.Value) -> ir.Node:
        return ir.Node("", "Squeeze", [value, row])

    set_apart(inside, part, enter, leave)  # 3.


def _add_row(node: ir.Node) -> None:
    """Kernel, strides, dilations, pads and constants of one operator get a row before the columns.

    A constant with one axis or none is of columns as before.
    """
    if node.op_type in SPATIAL:
        for name in ("kernel_shape", "strides", "dilations"):
            if (sizes := graph.attribute(node, name, None)) is not None:
                node.attributes[name] = ir.AttrInt64s(name, (1, *sizes))
        if (pads := graph.attribute(node, "pads", None)) is not None:
            left, right = pads
            node.attributes["pads"] = ir.AttrInt64s("pads", (0, left, 0, right))
    for i, value in enumerate(node.inputs):
        is_along = node.op_type in PAIRS or (node.op_type == "Conv" and i == 1)
        if is_along and graph.is_constant(value) and len(graph.shape_of(graph.value(value))) > 1:
            array = np.expand_dims(graph.array(graph.value(value)), -2)
            graph.set_input(node, i, constant(graph.home(node), graph.name_of(value), array))

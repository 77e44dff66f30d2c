"""Convs over time, written as N x 1, turned to 1 x N: onnxruntime reads along the last axis.

A Pad stays a node of its own: folded into a Conv with a long kernel, it makes that slower.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from quant_core.model import graph
from quant_core.optimize.applied import Applied, Chosen
from quant_core.optimize.edit import constant, transpose
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

SWAP = (0, 1, 3, 2)


def wide_kernels(model: ir.Model, facts: Facts, chosen: Chosen) -> list[Applied]:
    """Height and width change places in every part of the graph whose Convs have kernels of N x 1.

        x(n, c, t, 1) -> Conv(N x 1) -> Relu -> MaxPool(2 x 1) -> y(n, d, u, 1)
        =>   x -> Transpose -> Conv(1 x N) -> Relu -> MaxPool(1 x 2) -> Transpose -> y

    1. A part starts at a Conv with N > 1, and grows over operators that know both axes alike.
    2. Every tensor of it has the width 1, which is known.
    3. A Transpose stands where a tensor enters or leaves; with one axis of a single entry, it moves
       no number.
    """
    applied = []
    for inside in graph.graphs_of(model):
        seen: set[ir.Node] = set()
        for start in list(inside):
            if start not in seen and chosen(str(start.name)) and _is_tall(start, facts):  # 1. 2.
                part = grown_from(start, lambda node: _swaps(node, facts))
                seen |= part
                _turn(inside, part)  # 3.
                convs = [str(n.name) for n in inside if n in part and n.op_type == "Conv"]
                applied += [Applied("wide_kernels", name, ()) for name in convs]
    return applied


def _is_tall(node: ir.Node, facts: Facts) -> bool:
    if node.op_type != "Conv" or not _swaps(node, facts):
        return False
    return graph.shape_of(graph.value(node.inputs[1]))[2] > 1


def _swaps(node: ir.Node, facts: Facts) -> bool:
    """Whether the node can be turned, and all its tensors have four axes and the width 1."""
    if node.domain or len([v for v in node.outputs if v.name]) != 1:
        return False
    narrow = [
        facts.rank(v) == 4 and facts.size(v, 3) == 1 for v in (*data_of(node), node.outputs[0])
    ]
    if not all(narrow):
        return False
    if node.op_type in PAIRS:
        constants = [v for v in node.inputs if graph.is_constant(v)]
        return all(_is_flat(graph.shape_of(graph.value(v))) for v in constants)
    if node.op_type in CONDITIONS:
        return CONDITIONS[node.op_type](node)
    return node.op_type in SPATIAL or node.op_type in SAME


def _pads_all_axes_by_constants(pad: ir.Node) -> bool:
    return graph.is_constant(graph.input_at(pad, 1)) and graph.input_at(pad, 3) is None


def _joins_samples_or_channels(concat: ir.Node) -> bool:
    return graph.attribute(concat, "axis", 0) in (0, 1, -3, -4)


# Operators that can be turned if this holds.
CONDITIONS = {
    "Conv": has_own_weight,
    "Pad": _pads_all_axes_by_constants,
    "Concat": _joins_samples_or_channels,
}


def _is_flat(shape: tuple[int, ...]) -> bool:
    """Whether a constant of this shape varies along channels alone."""
    return len(shape) <= 4 and all(n == 1 for n in shape[-2:])


def _turn(inside: ir.Graph, part: set[ir.Node]) -> None:
    """Edit in place: the operators of the part see height and width swapped, others do not."""
    for node in [n for n in inside if n in part]:
        _swap_attributes(node)
    set_apart(inside, part, _turned, _turned)


def _turned(value: ir.Value) -> ir.Node:
    """A new Transpose that swaps height and width."""
    return transpose(value, SWAP)


def _swap_attributes(node: ir.Node) -> None:
    """Kernel, strides, dilations, pads and the weight of one operator, height and width swapped."""
    for name in ("kernel_shape", "strides", "dilations"):
        if (sizes := graph.attribute(node, name, None)) is not None:
            node.attributes[name] = ir.AttrInt64s(name, tuple(reversed(sizes)))
    if node.op_type in SPATIAL and (pads := graph.attribute(node, "pads", None)) is not None:
        top, left, bottom, right = pads
        node.attributes["pads"] = ir.AttrInt64s("pads", (left, top, right, bottom))
    inside = graph.home(node)
    if node.op_type == "Conv":
        weight = graph.value(node.inputs[1])
        turned = np.ascontiguousarray(graph.array(weight).transpose(SWAP))
        graph.set_input(node, 1, constant(inside, str(weight.name), turned))
    if node.op_type == "Pad":
        pads = graph.value(node.inputs[1])
        turned = graph.array(pads).reshape(2, 4)[:, list(SWAP)].reshape(-1)
        graph.set_input(node, 1, constant(inside, str(pads.name), turned))

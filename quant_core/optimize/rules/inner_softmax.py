"""Softmax over an axis that is not the last."""

from __future__ import annotations

import onnx_ir as ir

from quant_core.model import graph
from quant_core.optimize import convolution
from quant_core.optimize.applied import Applied, Chosen
from quant_core.optimize.edit import constant, put_before, remove, transpose
from quant_core.optimize.facts import Facts

SINCE_OPSET = 13  # before it, Softmax flattens


def inner_softmax(model: ir.Model, facts: Facts, chosen: Chosen) -> list[Applied]:
    """Softmax over an inner axis, moved to the last one and back.

        Softmax(axis = i)   =>   Transpose(i <-> last) -> Softmax(-1) -> Transpose(i <-> last)

    1. The rank is known, and the axis is an inner one: onnxruntime walks along it number by number.
    2. A 1 x 1 Conv over that axis that alone reads the result (the expectation over the bins of a
       YOLO's boxes) becomes a MatMul before the way back, which has less to move then.
    """
    applied: list[Applied] = []
    if graph.opset(model) < SINCE_OPSET:
        return applied
    for node in graph.nodes_of(model, "Softmax", "LogSoftmax"):
        inside = graph.home(node)
        rank = facts.rank(node.inputs[0])
        if rank is None or not chosen(str(node.name)):
            continue
        axis = graph.attribute(node, "axis", -1) % rank
        if axis == rank - 1:
            continue
        perm = list(range(rank))
        perm[axis], perm[-1] = perm[-1], perm[axis]
        conv = graph.only_reader(node.outputs[0])
        if conv is not None and axis == 1 and convolution.read_pixelwise(conv):
            _turn(inside, node, perm, conv)
            applied.append(Applied("inner_softmax", str(node.name), ()))
            applied.append(Applied("inner_softmax", str(conv.name), ()))
        else:
            _turn(inside, node, perm)
            applied.append(Applied("inner_softmax", str(node.name), ()))
    return applied


def _turn(inside: ir.Graph, node: ir.Node, perm: list[int], conv: ir.Node | None = None) -> None:
    """The Softmax, and the Conv behind it if there is one, between two Transposes."""
    end, name = node if conv is None else conv, str(node.name)
    turned = put_before(node, transpose(graph.value(node.inputs[0]), perm), name)
    softmax = ir.Node("", node.op_type, [turned], [ir.AttrInt64("axis", -1)], name=name)
    last = put_before(node, softmax, name)
    if conv is not None:  # 2.
        weight = graph.array(graph.value(conv.inputs[1]))
        matrix = constant(inside, f"{conv.name}_weight", weight.reshape(len(weight), -1).T)
        product = ir.Node("", "MatMul", [last, matrix], name=str(conv.name))
        last = put_before(end, product, str(conv.name))
        if graph.input_at(conv, 2) is not None:
            last = put_before(end, ir.Node("", "Add", [last, conv.inputs[2]]), str(conv.name))
    back = put_before(end, transpose(last, perm), str(end.name))
    graph.replace_value(end.outputs[0], back)
    remove([node] if conv is None else [node, conv])

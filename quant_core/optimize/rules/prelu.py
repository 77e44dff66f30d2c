"""PRelu, and what is one, in operators that onnxruntime computes in its blocked layout."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from quant_core.model import graph
from quant_core.optimize.affine import affine_of
from quant_core.optimize.applied import Applied, Chosen
from quant_core.optimize.edit import constant, is_float32, numbers, put_in_place
from quant_core.optimize.facts import Facts


def prelu_as_leaky_relu(model: ir.Model, facts: Facts) -> list[Applied]:
    """PRelu with one slope for all elements.

    PRelu(x, a)   =>   LeakyRelu(x, alpha = a)
    """
    applied = []
    for node in _prelus(model):
        slope = numbers(graph.value(node.inputs[1]))
        if not slope.size or (slope != slope.flat[0]).any() or not _fits(slope, node, facts):
            continue
        alpha = ir.AttrFloat32("alpha", float(slope.flat[0]))
        new = ir.Node("", "LeakyRelu", [node.inputs[0]], [alpha], name=node.name)
        put_in_place([node], new)
        applied.append(Applied("prelu_as_leaky_relu", str(node.name), ()))
    return applied


def max_as_leaky_relu(model: ir.Model, facts: Facts) -> list[Applied]:
    """A leaky ReLU that is written as a maximum.

    Max(x, a * x) with a from 0 to 1   =>   LeakyRelu(x, alpha = a)
    """
    applied = []
    for node in [n for n in graph.nodes_of(model, "Max") if len(n.inputs) == 2]:
        for x, scaled in (tuple(node.inputs), tuple(node.inputs)[::-1]):
            maker = graph.value(scaled).producer()
            read = None if maker is None else affine_of(maker, facts)
            if maker is None or read is None or graph.only_reader(graph.value(scaled)) is not node:
                continue
            source, affine = read
            slope = float(affine.scale[0])
            if source is not x or affine.axis is not None or affine.shifts or not 0 <= slope <= 1:
                continue
            alpha = ir.AttrFloat32("alpha", slope)
            put_in_place([maker, node], ir.Node("", "LeakyRelu", [x], [alpha], name=node.name))
            applied.append(Applied("max_as_leaky_relu", str(node.name), (str(maker.name),)))
            break
    return applied


def _fits(slope: np.ndarray, node: ir.Node, facts: Facts) -> bool:
    """Whether the slope does not widen the operand."""
    sizes = facts.shape(node.inputs[0])
    if sizes is None or slope.ndim > len(sizes):
        return False
    return all(n in (1, m) for n, m in zip(slope.shape[::-1], sizes[::-1], strict=False))


def prelu_as_convs(model: ir.Model, facts: Facts, chosen: Chosen) -> list[Applied]:
    """PRelu with a slope per channel as two depthwise 1 x 1 Convs.

        PRelu(x, a)   =>   Conv(x, w = a) + Relu(Conv(x, w = 1 - a))

    1. x has four axes and its channels are known; a varies along channels alone.
    2. (1 - a) Relu(x) = Relu((1 - a) x) where no 1 - a is negative: onnxruntime puts the Relu and
       the sum into the Convs.
    3. Where one is, the Relu comes first: Conv(x, w = a) + Conv(Relu(x), w = 1 - a).
    """
    applied = []
    for node in _prelus(model):
        x, slope = graph.value(node.inputs[0]), numbers(graph.value(node.inputs[1]))
        channels = facts.size(x, 1)
        flat = slope.ndim <= 4 and slope.size == channels and slope.shape[-2:] == (1, 1)
        if not chosen(str(node.name)):
            continue
        if facts.rank(x) != 4 or not channels or not flat:
            continue
        slope = slope.reshape(channels, 1, 1, 1)
        linear = _depthwise(node, x, slope, "linear")
        if (slope > 1).any():  # 3.
            first = _relu(node, x)
            last = _depthwise(node, first.outputs[0], 1 - slope, "rest")
        else:
            first = _depthwise(node, x, 1 - slope, "rest")
            last = _relu(node, first.outputs[0])
        total = ir.Node("", "Add", [linear.outputs[0], last.outputs[0]], name=node.name)
        put_in_place([node], linear, first, last, total)
        applied.append(Applied("prelu_as_convs", str(node.name), ()))
    return applied


def _prelus(model: ir.Model) -> list[ir.Node]:
    """Every PRelu of the model whose slope is a constant."""
    return [n for n in graph.nodes_of(model, "PRelu") if is_float32(n.inputs[1])]


def _relu(node: ir.Node, x: ir.Value) -> ir.Node:
    return ir.Node("", "Relu", [x], name=f"{node.name}_relu")


def _depthwise(node: ir.Node, x: ir.Value, weight: np.ndarray, part: str) -> ir.Node:
    channels = weight.shape[0]
    name = f"{node.name}_{part}"
    attributes = [ir.AttrInt64("group", channels), ir.AttrInt64s("kernel_shape", (1, 1))]
    inputs = [x, constant(graph.home(node), f"{name}_weight", weight)]
    return ir.Node("", "Conv", inputs, attributes, name=name)

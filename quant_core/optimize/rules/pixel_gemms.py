"""Convs of images of one pixel, behind a global pool, become matrix products."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from quant_core.model import graph
from quant_core.optimize import convolution
from quant_core.optimize.applied import Applied, Chosen
from quant_core.optimize.convolution import ACTIVATIONS
from quant_core.optimize.edit import constant, put_before, remove
from quant_core.optimize.facts import Facts


def pixel_gemms(model: ir.Model, facts: Facts, chosen: Chosen) -> list[Applied]:
    """The two layers of squeeze and excitation, and whatever else computes on one pixel.

        x(n, c, 1, 1) -> Conv -> Relu -> Conv -> HardSigmoid
        =>   x -> Reshape(n, c) -> Gemm -> Relu -> Gemm -> HardSigmoid -> Reshape(n, d, 1, 1)

    1. A row of 1 x 1 Convs of one group and of activations, each read by the next alone; the first
       reads a tensor whose height and width are known to be 1.
    2. For one pixel a blocked Conv has idle lanes, and the layout has to be made and unmade.

    Source: Hu et al. 2018, "Squeeze-and-Excitation Networks", arXiv 1709.01507, section 3.
    """
    applied = []
    for node in graph.nodes_of(model):
        if not chosen(str(node.name)):
            continue
        row = _row_from(node, facts)
        if row:
            _write(graph.home(node), row)
            names = [str(n.name) for n in row if n.op_type == "Conv"]
            applied.append(Applied("pixel_gemms", names[0], ()))
    return applied


def _row_from(first: ir.Node, facts: Facts) -> list[ir.Node]:
    """The Convs and activations that begin at this Conv, none if it is not on one pixel."""
    if not convolution.read_pixelwise(first) or facts.rank(first.inputs[0]) != 4:
        return []
    if [facts.size(first.inputs[0], i) for i in (2, 3)] != [1, 1]:
        return []
    row, node = [first], graph.only_reader(first.outputs[0])
    while node is not None and not node.domain and node.inputs[0] is row[-1].outputs[0]:
        if node.op_type not in ACTIVATIONS and not convolution.read_pixelwise(node):
            break
        row.append(node)
        node = graph.only_reader(node.outputs[0])
    return row


def _write(inside: ir.Graph, row: list[ir.Node]) -> None:
    end, value = row[-1], graph.value(row[0].inputs[0])
    matrix = ir.Node("", "Reshape", [value, _shape(inside, row[0], [0, -1])])
    value, channels = put_before(end, matrix, f"{end.name}_Reshape"), 0
    for node in row:
        conv = convolution.read(node)
        if conv is None:
            inputs = [value, *node.inputs[1:]]
            new = ir.Node("", node.op_type, inputs, node.attributes.values(), name=node.name)
        else:
            weight = conv.weight.reshape(conv.outputs, -1)
            inputs = [value, constant(inside, f"{node.name}_weight", weight)]
            inputs.append(constant(inside, f"{node.name}_bias", conv.bias))
            turned = [ir.AttrInt64("transB", 1)]
            new = ir.Node("", "Gemm", inputs, turned, name=node.name)
            channels = conv.outputs
        value = put_before(end, new, str(node.name))
    image = ir.Node("", "Reshape", [value, _shape(inside, end, [0, channels, 1, 1])])
    graph.replace_value(end.outputs[0], put_before(end, image, f"{end.name}_Reshape"))
    remove(row)


def _shape(inside: ir.Graph, node: ir.Node, sizes: list[int]) -> ir.Value:
    return constant(inside, f"{node.name}_shape", np.array(sizes, np.int64))

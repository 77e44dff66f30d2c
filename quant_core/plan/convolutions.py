"""What kind of Conv a node is: which kernel runs it, and which of its weights that kernel adds in
pairs.
"""

from __future__ import annotations

import math

import onnx_ir as ir

from quant_core.model import graph


def is_pointwise(node: ir.Node) -> bool:
    """Whether the Conv multiplies the channels of each pixel by one matrix."""
    if node.op_type != "Conv" or not graph.is_float_weight(node.inputs[1]):
        return False
    kernel = graph.shape_of(graph.value(node.inputs[1]))[2:]
    strides = graph.attribute(node, "strides", ())
    is_one_group = graph.attribute(node, "group", 1) == 1
    return (
        is_one_group and {*kernel, *strides} <= {1} and not any(graph.attribute(node, "pads", ()))
    )


def is_depthwise(node: ir.Node) -> bool:
    """Whether each output channel of the Conv sees one input channel."""
    grouped = node.op_type == "Conv" and graph.attribute(node, "group", 1) > 1
    return grouped and graph.shape_of(graph.value(node.inputs[1]))[1] == 1


def has_depthwise_kernel(node: ir.Node) -> bool:
    """Whether onnxruntime's kernel for depthwise Convs runs the Conv in integers, which adds in
    int32: each group has one input and one output channel.
    """
    if node.op_type != "Conv":
        return False
    shape = graph.shape_of(graph.value(node.inputs[1]))
    return shape[:2] == (graph.attribute(node, "group", 1), 1)


def has_other_pairs(node: ir.Node) -> bool:
    """Whether kernels that pair channels of one tap of the Conv add other neighbours than those of
    onnxruntime, which pair the last of an odd number of channels with the first of the next tap.
    """
    if node.op_type != "Conv":
        return False
    _, channels, *taps = graph.shape_of(graph.value(node.inputs[1]))
    return channels % 2 == 1 and channels > 1 and math.prod(taps) > 1

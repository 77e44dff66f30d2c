"""Why a node has no integer kernel although its operator has one; "" if it has one."""

from __future__ import annotations

import math

import onnx_ir as ir

from quant_core.model import graph
from quant_core.plan import layouts
from quant_core.plan.layouts import is_left_weight


def conv(node: ir.Node) -> str:
    bias = graph.input_at(node, 2)
    if bias is not None and not graph.is_constant(bias):
        return "a computed bias has no integer kernel"
    return ""


def matmul(node: ir.Node) -> str:
    if is_left_weight(node):
        return "a weight on the left has no integer kernel"
    if len(graph.value(node.inputs[1]).shape or ()) != 2:
        return "a stack of weight matrices has no integer kernel with a scale per channel"
    return ""


def gemm(node: ir.Node) -> str:
    if graph.attribute(node, "transA", 0):
        return "transA has no integer kernel"
    if graph.attribute(node, "alpha", 1.0) != 1.0 or graph.attribute(node, "beta", 1.0) != 1.0:
        return "alpha and beta other than 1 have no integer kernel"
    bias = graph.input_at(node, 2)
    if bias is None:
        return ""
    weight = graph.value(node.inputs[1])
    if not graph.is_constant(bias) or not graph.is_constant(weight):
        return "a computed bias has no integer kernel"
    shape = graph.shape_of(bias)
    channels = graph.shape_of(weight)[layouts.gemm(node, 2).channel_axis]
    if math.prod(shape) != 1 and (math.prod(shape) != channels or shape[-1] != channels):
        return "a bias with rows has no integer kernel"
    return ""


def lstm(node: ir.Node) -> str:
    if not all(graph.is_float_weight(node.inputs[i]) for i in (1, 2)):
        return "a computed weight has no integer kernel"
    return ""


def average_pool(node: ir.Node) -> str:
    if "dilations" in node.attributes:
        return "QLinearAveragePool does not load with dilations"
    if all(graph.attribute(node, a, 0) for a in ("ceil_mode", "count_include_pad")):
        return "QLinearAveragePool is wrong at borders that it rounds up and counts"
    return ""


def max_pool(node: ir.Node) -> str:
    if any(v.uses() or v.is_graph_output() for v in node.outputs[1:]):
        return "indices are found in float only"
    return ""


def identity(node: ir.Node) -> str:
    """Of an Identity that stands for a weight that others read (model/carried.py)."""
    return "its weight is multiplied where other operators carry it"

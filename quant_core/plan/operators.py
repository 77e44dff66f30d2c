"""Which inputs of which operator are data, weight and bias, and how the operator can compute in integers.

Source: onnxruntime's CPU kernels and its QDQ selectors; tests/facts holds each line against the installed version.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import onnx_ir as ir

from quant_core.model import graph


@dataclass(frozen=True, slots=True)
class Rule:
    """How one operator can be quantized.

    kind      anchor: multiplies by a weight, worth quantizing for its own sake
              elementwise: has a QLinear kernel, worth it between quantized neighbours only
              moves: only moves or picks values, runs on 8-bit data with the parameters of its input
              weight_only: no integer kernel worth having; its weight can still be stored in fewer bits
    data      positions of the inputs that carry activations; () means all of them
    weights   positions of the inputs that carry weights
    bias      position of the bias
    dynamic   activations may be quantized at run time, from each batch's own range
    needs_q   fuses only if its output is quantized again (Conv); MatMul and Gemm may leave integers at once
    """

    kind: str
    data: tuple[int, ...] = (0,)
    weights: tuple[int, ...] = ()
    bias: int | None = None
    dynamic: bool = False
    needs_q: bool = True


_MOVES = Rule("moves")
_ELEMENTWISE = Rule("elementwise")

RULES: dict[str, Rule] = {
    "Conv": Rule("anchor", weights=(1,), bias=2),
    "Gemm": Rule("anchor", weights=(1,), bias=2, dynamic=True, needs_q=False),
    "MatMul": Rule("anchor", weights=(1,), dynamic=True, needs_q=False),
    "LSTM": Rule("weight_only", weights=(1, 2), dynamic=True),
    "GRU": Rule("weight_only", weights=(1, 2)),
    "RNN": Rule("weight_only", weights=(1, 2)),
    "ConvTranspose": Rule("weight_only", weights=(1,)),
    "Gather": Rule("weight_only", data=(1,), weights=(0,)),
    "Add": Rule("elementwise", data=(0, 1)),
    "Mul": Rule("elementwise", data=(0, 1)),
    "Sigmoid": _ELEMENTWISE,
    "LeakyRelu": _ELEMENTWISE,
    "AveragePool": _ELEMENTWISE,
    "GlobalAveragePool": _ELEMENTWISE,
    "Concat": Rule("elementwise", data=()),
    "MaxPool": _MOVES,
    "Reshape": _MOVES,
    "Transpose": _MOVES,
    "Squeeze": _MOVES,
    "Unsqueeze": _MOVES,
    "Flatten": _MOVES,
}
CAPS = (
    "Relu",
    "Clip",
)  # fused into the operator before them when the quantized range makes them redundant


def channel_axis(node: ir.Node, weight: ir.Value) -> int:
    """The axis of the node's weight along which each slice makes one output channel.

    Conv (O, I/g, k...) 0; ConvTranspose (I, O/g, k...) 1; MatMul (..., K, N) the last; Gemm (K, N) 1 or, transB,
    (N, K) 0; recurrent (directions, gates * hidden, K) 1; Gather: the table's rows, 0.
    """
    if node.op_type == "Gemm":
        return 0 if graph.attribute(node, "transB", 0) else 1
    last = len(weight.shape) - 1  # type: ignore[arg-type]
    return {
        "Conv": 0,
        "ConvTranspose": 1,
        "MatMul": last,
        "LSTM": 1,
        "GRU": 1,
        "RNN": 1,
        "Gather": 0,
    }[node.op_type]


def why_not_integer(node: ir.Node) -> str:
    """Why this node has no integer kernel although its operator has one; empty if it has."""
    if node.op_type == "Gemm":
        return _why_not_gemm(node)
    if (
        node.op_type == "Conv"
        and len(node.inputs) > 2
        and not (node.inputs[2] is None or graph.is_constant(node.inputs[2]))
    ):
        return "a computed bias has no integer kernel"
    if node.op_type == "MatMul" and len(graph.value(node.inputs[1]).shape or ()) != 2:
        return "a stack of weight matrices has no integer kernel with a scale per channel"
    if node.op_type == "AveragePool" and "dilations" in node.attributes:
        return "QLinearAveragePool does not load with dilations"
    if node.op_type == "AveragePool" and all(
        graph.attribute(node, a, 0) for a in ("ceil_mode", "count_include_pad")
    ):
        return "QLinearAveragePool is wrong at borders that it rounds up and counts"
    if node.op_type == "MaxPool" and any(v.uses() or v.is_graph_output() for v in node.outputs[1:]):
        return "indices are found in float only"
    return ""


def _why_not_gemm(node: ir.Node) -> str:
    if graph.attribute(node, "transA", 0):
        return "transA has no integer kernel"
    if graph.attribute(node, "alpha", 1.0) != 1.0 or graph.attribute(node, "beta", 1.0) != 1.0:
        return "alpha and beta other than 1 have no integer kernel"
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is None:
        return ""
    weight = graph.value(node.inputs[1])
    if not graph.is_constant(bias) or not graph.is_constant(weight):
        return "a computed bias has no integer kernel"
    shape, channels = graph.shape_of(bias), graph.shape_of(weight)[channel_axis(node, weight)]
    if math.prod(shape) != 1 and (math.prod(shape) != channels or shape[-1] != channels):
        return "a bias with rows has no integer kernel"
    return ""


def is_depthwise(node: ir.Node) -> bool:
    """Whether each output channel of the Conv sees one input channel."""
    grouped = node.op_type == "Conv" and graph.attribute(node, "group", 1) > 1
    return grouped and graph.shape_of(graph.value(node.inputs[1]))[1] == 1

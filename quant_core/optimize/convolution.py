"""Convs with constant weights as values, so that several can become one and one several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import onnx_ir as ir

from quant_core.model import graph
from quant_core.optimize.affine import Numbers
from quant_core.optimize.edit import constant, free_name, is_float32, numbers

Sizes = tuple[int, ...]

# Operators that may stand behind a Conv, and compute each number alone.
ACTIVATIONS = frozenset(
    {"Relu", "LeakyRelu", "Sigmoid", "Tanh", "HardSigmoid", "HardSwish", "Clip"}
)


@dataclass(frozen=True, slots=True)
class Convolution:
    """What a Conv computes from its data.

    weight     (outputs, inputs / groups, taps...)
    bias       (outputs,)
    begin, end padding before and behind each image axis
    """

    weight: Numbers
    bias: Numbers
    strides: Sizes
    dilations: Sizes
    begin: Sizes
    end: Sizes
    groups: int

    @property
    def outputs(self) -> int:
        return int(self.weight.shape[0])

    @property
    def taps(self) -> Sizes:
        return tuple(self.weight.shape[2:])

    @property
    def inputs(self) -> int:
        return int(self.weight.shape[1] * self.groups)

    @property
    def is_padded(self) -> bool:
        return any(self.begin) or any(self.end)


def read(node: ir.Node) -> Convolution | None:
    """The node's convolution; None if it is no Conv, or its weight, bias or padding is computed."""
    if node.op_type != "Conv" or node.domain or not is_float32(node.inputs[1]):
        return None
    weight = numbers(graph.value(node.inputs[1]))
    axes = weight.ndim - 2
    if graph.attribute(node, "auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return None
    given = graph.input_at(node, 2)
    if given is not None and not is_float32(given):
        return None
    bias = np.zeros(len(weight)) if given is None else numbers(given)
    pads = tuple(graph.attribute(node, "pads", (0,) * 2 * axes))
    return Convolution(
        weight,
        bias,
        tuple(graph.attribute(node, "strides", (1,) * axes)),
        tuple(graph.attribute(node, "dilations", (1,) * axes)),
        pads[:axes],
        pads[axes:],
        graph.attribute(node, "group", 1),
    )


def read_pixelwise(node: ir.Node) -> Convolution | None:
    """The same, of a Conv that makes each pixel of all channels of that pixel alone; else None."""
    conv = read(node)
    if conv is None or conv.is_padded or conv.groups != 1:
        return None
    return conv if prod(conv.taps) == prod(conv.strides) == 1 else None


def make(inside: ir.Graph, name: str, x: ir.Value, conv: Convolution) -> ir.Node:
    """A Conv node that computes this from x, not yet in the graph; its output has a new name."""
    attributes = [
        ir.AttrInt64s("kernel_shape", conv.taps),
        ir.AttrInt64s("strides", conv.strides),
        ir.AttrInt64s("dilations", conv.dilations),
        ir.AttrInt64s("pads", (*conv.begin, *conv.end)),
        ir.AttrInt64("group", conv.groups),
    ]
    inputs = [x, constant(inside, f"{name}_weight", conv.weight)]
    if conv.bias.any():
        inputs.append(constant(inside, f"{name}_bias", conv.bias))
    node = ir.Node("", "Conv", inputs, attributes, name=name)
    node.outputs[0].name = free_name(inside, name)
    node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    return node


def identity(like: Convolution, scale: Numbers, shift: Numbers) -> Convolution | None:
    """scale * x + shift of shape (channels,), in the groups and with the strides of another.

    None if that does not keep channels and sizes.
    """
    if like.inputs != like.outputs or any(s != 1 for s in like.strides):
        return None
    size = like.outputs // like.groups
    blocks = [np.diag(part) for part in scale.reshape(like.groups, size)]
    weight = np.concatenate(blocks).reshape(like.outputs, size, *[1] * len(like.taps))
    none = (0,) * len(like.taps)
    return Convolution(weight, shift, like.strides, like.dilations, none, none, like.groups)


def added(convs: Sequence[Convolution]) -> Convolution | None:
    """One convolution that gives the sum of these, all of the same data; None if there is none.

    1. They step alike, have the same groups, and every tap meets the same pixel for all of them.
    2. The results have one size whatever the size of the data.
    """
    first = max(convs, key=lambda c: np.prod(c.taps))
    for c in convs:
        if (c.strides, c.groups, c.weight.shape[:2]) != (
            first.strides, first.groups, first.weight.shape[:2],
        ):  # fmt: skip
            return None
        for axis in range(len(c.taps)):
            if c.taps[axis] > 1 and c.dilations[axis] != first.dilations[axis]:  # 1.
                return None
            if _shrinks(c, axis) != _shrinks(first, axis):  # 2.
                return None
    starts = []  # of each kernel within the common one, in taps
    for c in convs:
        start = []
        for axis, dilation in enumerate(first.dilations):
            pixels = first.begin[axis] - c.begin[axis]
            inside = 0 <= pixels <= (first.taps[axis] - 1) * dilation
            if pixels % dilation or not inside:
                return None
            if pixels // dilation + c.taps[axis] > first.taps[axis]:
                return None
            start.append(pixels // dilation)
        starts.append(start)
    weight = np.zeros_like(first.weight)
    for c, start in zip(convs, starts, strict=True):
        part = tuple(slice(s, s + n) for s, n in zip(start, c.taps, strict=True))
        weight[(slice(None), slice(None), *part)] += c.weight
    return Convolution(
        weight, np.sum([c.bias for c in convs], 0), first.strides, first.dilations,
        first.begin, first.end, first.groups,
    )  # fmt: skip


def _shrinks(conv: Convolution, axis: int) -> int:
    """The pixels by which the result is smaller than the data, before it is strided."""
    return (conv.taps[axis] - 1) * conv.dilations[axis] - conv.begin[axis] - conv.end[axis]

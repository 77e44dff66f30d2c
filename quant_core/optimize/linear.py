"""What Conv, ConvTranspose, Gemm and MatMul can take into a constant weight and bias.

producer:  scale * (W x + b) + shift   =   (scale W) x + (scale b + shift)
consumer:  W (scale * x + shift) + b   =   (W scale) x + (W shift + b)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from quant_core.model import graph
from quant_core.optimize.affine import Affine, Numbers
from quant_core.optimize.edit import constant, is_float32, numbers, replace_constant
from quant_core.optimize.facts import Facts

WEIGHT, BIAS = 1, 2  # inputs of every one of them; MatMul has no bias
LIMIT = 1e30  # no product beyond it, far from float32's largest number


@dataclass(frozen=True, slots=True)
class Layout:
    """How a weight is indexed.

    matrix   a view (groups, outputs, inputs, taps) of a weight; channels count group by group
    back     the weight from such an array
    rank     of data and result, None where it is open (MatMul)
    axis     of the channels in data and result, -1 for the last
    """

    matrix: Numbers
    back: Callable[[Numbers], Numbers]
    rank: int | None
    axis: int


def layout(node: ir.Node) -> Layout | None:
    """How the node's float32 weight is indexed, None if it has no constant of its own."""
    if node.domain or node.op_type not in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
        return None
    weight = node.inputs[WEIGHT]
    if weight is None or not is_float32(weight) or graph.is_constant(node.inputs[0]):
        return None
    if len(weight.uses()) != 1 or weight.is_graph_output():
        return None  # copies for several readers would make the file larger
    shape = graph.shape_of(weight)
    if 0 in shape:
        return None
    if node.op_type in ("Conv", "ConvTranspose"):
        return _convolution(node, numbers(weight), graph.attribute(node, "group", 1))
    if len(shape) != 2 or graph.attribute(node, "transA", 0):
        return None
    rank = 2 if node.op_type == "Gemm" else None
    if graph.attribute(node, "transB", 0):
        return Layout(numbers(weight)[None, :, :, None], lambda m: m[0, :, :, 0], rank, -1)
    return Layout(numbers(weight).T[None, :, :, None], lambda m: m[0, :, :, 0].T, rank, -1)


def _convolution(node: ir.Node, weight: Numbers, groups: int) -> Layout:
    """Weights are (outputs, inputs / groups, taps...), those of ConvTranspose begin with inputs."""
    first, second, *_ = weight.shape
    matrix = weight.reshape(groups, first // groups, second, -1)
    if node.op_type == "Conv":
        return Layout(matrix, lambda m: m.reshape(weight.shape), weight.ndim, 1)
    swapped = matrix.transpose(0, 2, 1, 3)
    return Layout(swapped, lambda m: m.transpose(0, 2, 1, 3).reshape(weight.shape), weight.ndim, 1)


def takes_output(node: ir.Node, affine: Affine, facts: Facts) -> bool:
    """Whether the node can do what now happens to its result."""
    found = layout(node)
    if found is None:
        return False
    groups, outputs, _, _ = found.matrix.shape
    if not _fits(node, found, affine, facts, groups * outputs):
        return False
    if node.op_type == "MatMul":
        return not affine.shifts
    return bias_of(node) is not None


def take_output(node: ir.Node, affine: Affine) -> None:
    """The node's result becomes what was made of it."""
    found = layout(node)
    assert found is not None
    groups, outputs, _, _ = found.matrix.shape
    scale, shift = affine.widened(groups * outputs)
    set_constant(node, WEIGHT, found.back(found.matrix * scale.reshape(groups, outputs, 1, 1)))
    if node.op_type != "MatMul":
        old = bias_of(node)
        assert old is not None
        set_bias(node, scale * old + shift)


def takes_input(node: ir.Node, position: int, affine: Affine, facts: Facts) -> bool:
    """Whether the node can do itself what now happens to its data, input 0."""
    found = layout(node)
    if position != 0 or found is None:
        return False
    groups, _, inputs, _ = found.matrix.shape
    if not _fits(node, found, affine, facts, groups * inputs):
        return False
    if not affine.shifts:
        return True
    adds_everywhere = node.op_type == "Gemm" or (node.op_type == "Conv" and not is_padded(node))
    return adds_everywhere and bias_of(node) is not None


def take_input(node: ir.Node, affine: Affine) -> None:
    """The node takes what its data was made of."""
    found = layout(node)
    assert found is not None
    groups, outputs, inputs, _ = found.matrix.shape
    scale, shift = (n.reshape(groups, 1, inputs, 1) for n in affine.widened(groups * inputs))
    if affine.shifts:
        old = bias_of(node)
        assert old is not None
        alpha = graph.attribute(node, "alpha", 1.0)
        added = alpha * (found.matrix * shift).sum((2, 3)).reshape(groups * outputs)
        set_bias(node, old + added)
    set_constant(node, WEIGHT, found.back(found.matrix * scale))


def is_padded(node: ir.Node) -> bool:
    """Whether a Conv reads anything beside its data."""
    kernel = graph.shape_of(graph.value(node.inputs[WEIGHT]))[2:]
    if graph.attribute(node, "auto_pad", "NOTSET") in ("NOTSET", "VALID"):
        return any(graph.attribute(node, "pads", ()))
    return any(n != 1 for n in kernel)


def has_pads(pool: ir.Node) -> bool:
    """Whether a pool may average anything beside its data."""
    auto_pad = graph.attribute(pool, "auto_pad", "NOTSET")
    is_padded = auto_pad not in ("NOTSET", "VALID") or any(graph.attribute(pool, "pads", ()))
    return is_padded or bool(graph.attribute(pool, "ceil_mode", 0))


def _fits(node: ir.Node, found: Layout, affine: Affine, facts: Facts, channels: int) -> bool:
    """Whether the affine goes along the channels, or is one number; and weights stay in bounds."""
    if np.abs(found.matrix).max() * np.abs(affine.scale).max() > LIMIT:
        return False
    if affine.axis is None:
        return True
    rank = found.rank or facts.rank(node.inputs[0])
    return rank is not None and affine.axis == found.axis % rank and affine.scale.size == channels


def bias_of(node: ir.Node) -> Numbers | None:
    """What is added to each output channel, None if it is computed or differs by row."""
    found = layout(node)
    assert found is not None
    channels = found.matrix.shape[0] * found.matrix.shape[1]
    value = graph.input_at(node, BIAS)
    if value is None:
        return np.zeros(channels)
    if not is_float32(value) or value.is_graph_output():
        return None
    shape = graph.shape_of(value)
    if any(n != 1 for n in shape[:-1]) or len(shape) > 2:
        return None
    beta = graph.attribute(node, "beta", 1.0)
    return np.broadcast_to(beta * numbers(value).reshape(-1), channels).copy()


def set_bias(node: ir.Node, bias: Numbers) -> None:
    """Edit in place: the bias of a node that can have one."""
    if node.op_type == "Gemm":
        node.attributes.pop("beta", None)  # 1: the new bias has it inside
    if bias.any() or graph.input_at(node, BIAS) is not None:
        set_constant(node, BIAS, bias)


def set_constant(node: ir.Node, position: int, array: Numbers) -> None:
    """A new constant there, under the old name if nothing else reads that."""
    old = graph.input_at(node, position)
    if old is not None and len(old.uses()) == 1 and not old.is_graph_output():
        replace_constant(old, array)
    else:
        like = str(old.name) if old is not None else f"{node.name}_bias"
        graph.set_input(node, position, constant(graph.home(node), like, array))

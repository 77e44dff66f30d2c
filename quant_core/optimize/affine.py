"""What an operator does to numbers channel by channel: y = scale * x + shift."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quant_core.model import graph
from quant_core.optimize.edit import is_float32
from quant_core.optimize.facts import Facts

Numbers = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Affine:
    """y = scale * x + shift with one number for all elements, or one per index of an axis.

    scale, shift  of one shape: (1,), or (C,) with C numbers along the axis
    axis          counted from the front; None where one number holds for all elements
    """

    scale: Numbers
    shift: Numbers
    axis: int | None = None

    def __post_init__(self) -> None:
        assert self.scale.shape == self.shift.shape
        assert (self.axis is None) == (self.scale.size == 1), "one number needs no axis"

    @classmethod
    def make(cls, scale: Numbers, shift: Numbers, axis: int | None) -> Affine:
        """An Affine of numbers widened to one shape; equal numbers along the axis become one."""
        scale, shift = np.broadcast_arrays(scale.reshape(-1), shift.reshape(-1))
        if (scale == scale[0]).all() and (shift == shift[0]).all():
            return cls(scale[:1].copy(), shift[:1].copy(), None)
        return cls(scale.copy(), shift.copy(), axis)

    @property
    def scales(self) -> bool:
        return bool((self.scale != 1).any())

    @property
    def shifts(self) -> bool:
        return bool((self.shift != 0).any())

    @property
    def is_sound(self) -> bool:
        """Whether the numbers leave float32 enough digits wherever they are multiplied in."""
        size = np.abs(self.scale)
        inside = (size > 1e-12) & (size < 1e12)
        return bool((inside & (np.abs(self.shift) < 1e12)).all())

    def then(self, other: Affine) -> Affine | None:
        """One Affine that does this and then `other`; None if their axes differ."""
        axes = {a.axis for a in (self, other) if a.axis is not None}
        if len(axes) > 1 or (axes and len({a.scale.size for a in (self, other)} - {1}) > 1):
            return None
        scale = self.scale * other.scale
        shift = self.shift * other.scale + other.shift
        return Affine.make(scale, shift, next(iter(axes), None))

    def along(self, axis: int | None) -> Affine:
        """This Affine along another axis."""
        return Affine(self.scale, self.shift, None if self.axis is None else axis)

    def widened(self, channels: int) -> tuple[Numbers, Numbers]:
        """(scale, shift), each of shape (channels,)."""
        return np.broadcast_to(self.scale, channels), np.broadcast_to(self.shift, channels)


def affine_of(node: ir.Node, facts: Facts) -> tuple[ir.Value, Affine] | None:
    """What the node reads and does to it, None if that is not affine or changes the shape.

    1. Neg; Mul, Add, Sub and Div with a constant that varies along one axis at most.
    2. BatchNormalization in inference:
       scale = gamma / sqrt(var + epsilon), shift = beta - mean * scale.
    """
    if node.domain or len(node.outputs) != 1:
        return None
    # 1.
    if node.op_type == "Neg":
        return graph.value(node.inputs[0]), Affine(np.array([-1.0]), np.zeros(1))
    if node.op_type in ("Mul", "Add", "Sub", "Div") and len(node.inputs) == 2:
        return _arithmetic(node, facts)
    # 2.
    if node.op_type == "BatchNormalization" and not graph.attribute(node, "training_mode", 0):
        return _batch_norm(node, facts)
    return None


def _arithmetic(node: ir.Node, facts: Facts) -> tuple[ir.Value, Affine] | None:
    left, right = (graph.value(v) for v in node.inputs)
    if graph.is_constant(left) == graph.is_constant(right):
        return None
    x, constant = (right, left) if graph.is_constant(left) else (left, right)
    found = _numbers(constant, x, facts)
    if found is None:
        return None
    c, axis = found
    one, zero = np.ones(1), np.zeros(1)
    if node.op_type == "Mul":
        return x, Affine.make(c, zero, axis)
    if node.op_type == "Add":
        return x, Affine.make(one, c, axis)
    if node.op_type == "Sub" and x is left:
        return x, Affine.make(one, -c, axis)
    if node.op_type == "Sub":
        return x, Affine.make(-one, c, axis)
    if node.op_type == "Div" and x is left and (c != 0).all():
        return x, Affine.make(1 / c, zero, axis)
    return None


def _numbers(constant: ir.Value, x: ir.Value, facts: Facts) -> tuple[Numbers, int | None] | None:
    """The numbers of a constant that meets x, and their axis of x; None where it widens x, or has
    two axes.
    """
    if not is_float32(constant):
        return None
    shape = graph.shape_of(constant)
    sizes = facts.shape(x)
    varying = [i for i, n in enumerate(shape) if n != 1]
    if len(varying) > 1 or 0 in shape or (shape and (sizes is None or len(sizes) < len(shape))):
        return None
    numbers = graph.array(constant).astype(np.float64).reshape(-1)
    if not varying:
        return numbers, None
    assert sizes is not None
    axis = len(sizes) - len(shape) + varying[0]
    return (numbers, axis) if sizes[axis] == shape[varying[0]] else None


def _batch_norm(node: ir.Node, facts: Facts) -> tuple[ir.Value, Affine] | None:
    x, *parameters = (graph.value(v) for v in node.inputs)
    if not all(is_float32(p) for p in parameters):
        return None
    gamma, beta, mean, variance = (graph.array(p).astype(np.float64) for p in parameters)
    if facts.size(x, 1) != gamma.size:
        return None
    scale = gamma / np.sqrt(variance + graph.attribute(node, "epsilon", 1e-5))
    return x, Affine.make(scale, beta - mean * scale, 1)

"""In which units an input is, where the graph itself brings it to mean 0 and deviation 1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quant_core.model import graph
from quant_core.model.constants import floats_of

SHIFTS, SCALES = ("Add", "Sub"), ("Mul", "Div")
MOST = 4096  # numbers along the axis


@dataclass(frozen=True, slots=True)
class Units:
    """Mean and standard deviation of an input, along an axis counted from the last, or one for all.

    Tuples, so that they can be compared and printed in full.
    """

    axis: int
    means: tuple[float, ...]
    deviations: tuple[float, ...]

    def fit(self, shape: Sequence[int]) -> bool:
        """Whether an input of this shape can have them."""
        return len(shape) >= -self.axis and len(self.means) in (1, shape[self.axis])

    def of(self, values: NDArray[Any]) -> NDArray[Any]:
        """Values of mean 0 and deviation 1 in these units."""
        along = (-1, *[1] * (-self.axis - 1))
        means, deviations = np.reshape(self.means, along), np.reshape(self.deviations, along)
        return np.asarray(means + deviations * values)


def find_units(source: ir.Value) -> Units | None:
    """The units of a float input; None if the graph does not tell, or others read it too.

    1. input -> BatchNormalization
    2. input -> Scaler
    3. input -> constants added and multiplied, at least one of each
    """
    reader = first_reader(source)
    if reader is None or source.shape is None:
        return None
    if reader.op_type == "BatchNormalization":  # 1
        mean, variance = (floats_of(graph.input_at(reader, k), MOST) for k in (3, 4))
        if mean is None or variance is None:
            return None
        below = (-1, *[1] * (len(source.shape) - 2))
        epsilon = graph.attribute(reader, "epsilon", 1e-5)
        return _units(mean.reshape(below), np.sqrt(np.abs(variance) + epsilon).reshape(below))
    if reader.op_type == "Scaler":  # 2
        listed = (graph.attribute(reader, name, ()) for name in ("offset", "scale"))
        offset, scale = (np.asarray(numbers, np.float64) for numbers in listed)
        return _units(offset, _inverse(scale)) if offset.size and scale.size else None
    return _arithmetic_units(reader)  # 3


def first_reader(source: ir.Value) -> ir.Node | None:
    """The node that reads an input, maybe in another type; None if others read it too."""
    reader = graph.only_reader(source)
    while reader is not None and reader.op_type in ("Cast", "Identity"):
        reader = graph.only_reader(reader.outputs[0])
    return reader


def _arithmetic_units(first: ir.Node) -> Units | None:
    """Those of factor * x + term, which constants that are added and multiplied make of the input x
    of the first of these nodes.
    """
    factor, term = np.ones(()), np.zeros(())
    seen: set[str] = set()
    reader: ir.Node | None = first
    while reader is not None and reader.op_type in (*SHIFTS, *SCALES):
        constant = floats_of(reader.inputs[1], MOST)
        if constant is None and reader.op_type in ("Add", "Mul"):
            constant = floats_of(reader.inputs[0], MOST)
        if constant is None:
            break
        if reader.op_type in SHIFTS:
            term = term + (constant if reader.op_type == "Add" else -constant)
        else:
            by = constant if reader.op_type == "Mul" else _inverse(constant)
            factor, term = factor * by, term * by
        seen.add(reader.op_type)
        reader = graph.only_reader(reader.outputs[0])
    if seen.isdisjoint(SHIFTS) or seen.isdisjoint(SCALES):
        return None
    return _units(-term * _inverse(factor), np.abs(_inverse(factor)))


def _inverse(numbers: NDArray[Any]) -> NDArray[Any]:
    """1 / numbers, and 1 for 0."""
    return np.asarray(1 / np.where(numbers == 0, 1.0, numbers))


def _units(means: NDArray[Any], deviations: NDArray[Any]) -> Units | None:
    """None if they vary along several axes, or are not finite."""
    means, deviations = np.broadcast_arrays(means, deviations)
    varying = [axis for axis, size in enumerate(means.shape) if size > 1]
    if len(varying) > 1 or not np.isfinite([means, deviations]).all():
        return None
    axis = varying[0] - means.ndim if varying else -1
    return Units(axis, tuple(means.ravel().tolist()), tuple(deviations.ravel().tolist()))

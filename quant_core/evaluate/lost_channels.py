"""Outputs that are written as integers with one scale, of which some channel is lost.

A field in kelvin beside one in pascal, or a height of thousands that varies by tens, lies within a
step of the integers. The SQNR of the output as a whole does not tell.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quant_core.evaluate.output_tally import MASK
from quant_core.evaluate.outputs import Outputs
from quant_core.metrics import PROBABILITY_ERROR
from quant_core.model import graph
from quant_core.numerics.affine import Grid, QuantParams, dequantize, quantize
from quant_core.plan.operators import CAPS

LEAST_VARIATION = 1e-4  # of a channel's mean: one that varies by less is constant
_PASSED = frozenset({"DequantizeLinear", "QuantizeLinear", "Transpose", "Identity", "Cast"})


def lost_channels(
    model: ir.Model, outputs: Iterable[Outputs], least_db: float
) -> dict[str, ir.Node]:
    """Output of the quantized model -> the node that writes it in integers, where these alone leave
    a channel less than `least_db` of SQNR around its mean.

    outputs  of the float model: a list of arrays for each sample
    """
    written = {i: _written(output) for i, output in enumerate(model.graph.outputs)}
    sums = {i: _ChannelSums(found) for i, found in written.items() if found is not None}
    if not sums:
        return {}
    for arrays in outputs:
        for i, of_output in sums.items():
            of_output.add(arrays[i])
    return {
        str(model.graph.outputs[i].name): of_output.written.writer
        for i, of_output in sums.items()
        if of_output.loses_one(least_db)
    }


@dataclass(frozen=True, slots=True, eq=False)
class _Written:
    """How an output is written: by which node, in which integers, and along which axis its channels
    lie.
    """

    writer: ir.Node
    params: QuantParams
    axis: int


def _written(output: ir.Value) -> _Written | None:
    """How the output is written; None where it is not integers that are only moved."""
    pair, perms, node = None, [], output.producer()
    while node is not None and node.op_type in _PASSED:
        if node.op_type == "DequantizeLinear":
            pair = node
        if node.op_type == "Transpose":
            perms.append(tuple(graph.attribute(node, "perm", ())))
        node = graph.value(node.inputs[0]).producer()
    if node is not None and node.op_type in CAPS:
        node = graph.value(node.inputs[0]).producer()
    if node is None or pair is None or len(pair.inputs) < 3:
        return None
    scale, zero_point = (graph.constant(value) for value in pair.inputs[1:])
    if scale is None or zero_point is None or scale.size != 1:
        return None
    grid = Grid(8 * zero_point.itemsize, zero_point.dtype.kind == "i", symmetric=False)
    params = QuantParams(scale.reshape(()), zero_point.reshape(()), None, grid)
    axis = 1
    for perm in reversed(perms):
        if axis not in perm:
            return None
        axis = perm.index(axis)
    return _Written(node, params, axis)


class _ChannelSums:
    """Sums over the samples of one output: of each channel's values, squares and errors."""

    def __init__(self, written: _Written) -> None:
        self.written = written
        self.count = 0  # of the values of a channel
        self.sums = np.zeros((3, 1))  # then (3, C)
        self.lo, self.hi, self.largest_error = math.inf, -math.inf, 0.0
        self.are_known = True  # the same channels in all samples, without masks

    def add(self, x: NDArray[Any]) -> None:
        """Add what float gives for a sample; of what has no such channels nothing is lost."""
        axis = self.written.axis
        if x.dtype.kind != "f" or x.ndim <= axis or not x.size:
            return
        rows = np.moveaxis(x, axis, 0).reshape(x.shape[axis], -1).astype(np.float64)
        are_others = self.count > 0 and self.sums.shape[1] != len(rows)
        if are_others or not (np.abs(rows) < MASK).all():
            self.are_known = False
            return
        params = self.written.params
        error = dequantize(quantize(rows, params), params) - rows
        powers = (rows, np.square(rows), np.square(error))
        self.sums = self.sums + np.stack([values.sum(1) for values in powers])
        self.count += rows.shape[1]
        self.lo, self.hi = min(self.lo, rows.min()), max(self.hi, rows.max())
        self.largest_error = max(self.largest_error, np.abs(error).max())

    def loses_one(self, least_db: float) -> bool:
        """Whether a channel that varies is lost. Probabilities that hardly change lose nothing."""
        if not (self.count and self.are_known):
            return False
        is_probability = self.lo >= 0 and self.hi <= 1
        if is_probability and self.largest_error < PROBABILITY_ERROR:
            return False
        mean, square, noise = self.sums / self.count
        signal = np.maximum(square - np.square(mean), 0.0)
        varies = np.sqrt(signal) > LEAST_VARIATION * np.abs(mean)
        return bool((varies & (signal < 10 ** (least_db / 10) * noise)).any())

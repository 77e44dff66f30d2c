"""Outputs that lose a channel in integers with one scale.

A field in kelvin beside one in pascal, or a height of thousands that varies by tens, lies within a
step of the integers. The SQNR of the output as a whole does not tell.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quant_core.evaluate.output_tally import MASK
from quant_core.metrics import PROBABILITY_ERROR
from quant_core.model import graph
from quant_core.model.session import Feed
from quant_core.model.values import values_of
from quant_core.numerics.affine import Grid, QuantParams, dequantize, quantize
from quant_core.numerics.sqnr import LEAST_VARIATION
from quant_core.plan.operators import CAPS, RULES, Kind

# Operators that move values: integers behind them are those before them.
_MOVES = frozenset(name for name, rule in RULES.items() if rule.kind is Kind.MOVES)
# Other operators that make a channel of their output of one channel of their input. Relu is none of
# them: of the residual sums of a backbone, whose features are an output, the last alone counts.
_KEEPS_CHANNELS = frozenset(
    {"QuantizeLinear", "DequantizeLinear", "Identity", "Cast", "CastLike", "Slice", "Split"}
    | {"Add", "Sub", "Mul", "Div", "Concat", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"}
    | {"Pad", "Resize", "Upsample", "DepthToSpace", "SpaceToDepth", "ReduceMean"}
)


def lost_channels(
    model: ir.Model, quantized: ir.Model, feeds: Iterable[Feed], least_db: float
) -> dict[str, list[ir.Node]]:
    """Output of the quantized model -> the nodes that write it in integers, where these alone leave
    a channel less than `least_db` of SQNR around its mean.

    model  the prepared float model, whose nodes have the same names
    """
    in_float = {str(node.name): str(graph.first_output(node).name) for node in model.graph}
    written = {str(output.name): list(_written(output)) for output in quantized.graph.outputs}
    sums = {
        found: _ChannelSums(found)
        for of_output in written.values()
        for found in of_output
        if found.rounded in in_float
    }
    if not sums:
        return {}
    for values in values_of(model, {in_float[found.rounded] for found in sums}, feeds):
        for found, of_tensor in sums.items():
            if in_float[found.rounded] in values:
                of_tensor.add(values[in_float[found.rounded]])
    lost = {found for found, of_tensor in sums.items() if of_tensor.loses_one(least_db)}
    return {
        output: [found.writer for found in of_output if found in lost]
        for output, of_output in written.items()
        if not lost.isdisjoint(of_output)
    }


@dataclass(frozen=True, slots=True, eq=False)
class _Written:
    """Integers with one scale that an output is made of.

    writer   the node that computes them
    rounded  the name of the node whose output is rounded: the writer, or the Relu or Clip behind it
    """

    writer: ir.Node
    rounded: str
    params: QuantParams

    @property
    def axis(self) -> int:
        """The axis of the channels."""
        rule = RULES.get(self.writer.op_type)
        return rule.mean_axis if rule is not None and rule.kind is Kind.ANCHOR else 1


def _written(output: ir.Value) -> Iterator[_Written]:
    """The last integers before the output, on each path whose nodes keep channels apart."""
    waiting, seen = [output], {output}
    while waiting:
        node = waiting.pop().producer()
        if node is None or node.op_type not in _MOVES | _KEEPS_CHANNELS:
            continue
        found = _rounded(node) if node.op_type == "DequantizeLinear" else None
        if found is not None:
            yield found
            continue
        new = [value for value in node.inputs if value is not None and value not in seen]
        seen.update(new)
        waiting += new


def _rounded(pair: ir.Node) -> _Written | None:
    """The integers that this DequantizeLinear reads; None unless they have one scale, and a node
    that computes values, rather than moving them, writes them.
    """
    before = graph.value(pair.inputs[0]).producer()
    if before is None or before.op_type != "QuantizeLinear" or len(pair.inputs) < 3:
        return None
    node = graph.value(before.inputs[0]).producer()
    scale, zero_point = (graph.constant(value) for value in pair.inputs[1:3])
    if node is None or node.op_type in _MOVES or scale is None or zero_point is None:
        return None
    if scale.size != 1:
        return None
    grid = Grid(8 * zero_point.itemsize, zero_point.dtype.kind == "i", symmetric=False)
    params = QuantParams(scale.reshape(()), zero_point.reshape(()), None, grid)
    capped = graph.value(node.inputs[0]).producer() if node.op_type in CAPS else None
    return _Written(capped or node, str(node.name), params)


class _ChannelSums:
    """Sums over the feeds of one tensor: of each channel's values, squares and errors."""

    def __init__(self, written: _Written) -> None:
        self.written = written
        self.count = 0  # of the values of a channel
        self.sums = np.zeros((3, 1))  # then (3, C)
        self.lo, self.hi, self.largest_error = math.inf, -math.inf, 0.0
        self.are_known = True  # the same channels in all feeds, without masks

    def add(self, x: NDArray[Any]) -> None:
        """Add what float gives for a feed; of what has no such channels nothing is lost."""
        axis = self.written.axis
        if x.dtype.kind != "f" or x.ndim <= max(axis, 0) or not x.size:
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

"""Outputs that are written as integers with one scale, of which some channel is lost.

A field in kelvin beside one in pascal, or a height of thousands that varies by tens, lies within a
step of the integers. The SQNR of the output as a whole does not tell.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quant_core.evaluate.outputs import Outputs
from quant_core.metrics import PROBABILITY_ERROR
from quant_core.model import graph
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
    rounded = {i: found for i, found in written.items() if found is not None}
    if not rounded:
        return {}
    by_sample = [{i: arrays[i] for i in rounded} for arrays in outputs]
    return {
        str(model.graph.outputs[i].name): found.writer
        for i, found in rounded.items()
        if _loses_one([arrays[i] for arrays in by_sample], found, least_db)
    }


@dataclass(frozen=True, slots=True, eq=False)
class _Written:
    """How an output is written: by which node, on which grid, and along which axis its channels
    lie.
    """

    writer: ir.Node
    scale: NDArray[Any]
    zero_point: NDArray[Any]
    axis: int

    def rounded(self, x: NDArray[Any]) -> NDArray[Any]:
        """What the values are after they were integers."""
        ends = np.iinfo(self.zero_point.dtype)
        q = np.clip(np.rint(x / self.scale) + self.zero_point, ends.min, ends.max)
        return np.asarray((q - self.zero_point) * self.scale)


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
    axis = 1
    for perm in reversed(perms):
        if axis not in perm:
            return None
        axis = perm.index(axis)
    return _Written(node, scale, zero_point, axis)


def _loses_one(arrays: Sequence[NDArray[Any]], written: _Written, least_db: float) -> bool:
    """Whether a channel that varies is lost. Probabilities that hardly change lose nothing."""
    if any(x.dtype.kind != "f" or x.ndim <= written.axis for x in arrays):
        return False
    rows = [np.moveaxis(x, written.axis, 0).reshape(x.shape[written.axis], -1) for x in arrays]
    if len({len(row) for row in rows}) > 1:
        return False
    values = np.concatenate(rows, axis=1).astype(np.float64)
    if not values.size or not np.isfinite(values).all():
        return False
    error = written.rounded(values) - values
    is_probability = values.min() >= 0 and values.max() <= 1
    if is_probability and np.abs(error).max() < PROBABILITY_ERROR:
        return False
    signal, noise = values.var(axis=1), np.square(error).mean(axis=1)
    varies = np.sqrt(signal) > LEAST_VARIATION * np.abs(values.mean(axis=1))
    return bool((varies & (signal < 10 ** (least_db / 10) * noise)).any())

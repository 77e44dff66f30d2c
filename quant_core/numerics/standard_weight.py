"""A weight rounded to nearest for ONNX's DequantizeLinear, which any runtime knows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from quant_core.numerics.affine import (
    Grid,
    Integers,
    QuantParams,
    choose_params,
    dequantize,
    quantize,
    range_of,
)
from quant_core.numerics.granularity import Granularity, PerBlock, PerTensor
from quant_core.numerics.layout import Layout
from quant_core.numerics.output_noise import noise_db


@dataclass(frozen=True, slots=True, eq=False)
class StandardWeight:
    """What the standard DequantizeLinear takes, and how near it is to the weight.

    rows          the layout by which the integers are rows of output channels, where no axis of the
                  weight tells these apart; None if they lie as the weight does
    sqnr_db       signal to rounding noise in dB
    worst_row_db  the same of the worst output channel
    """

    q: Integers
    params: QuantParams
    rows: Layout | None
    sqnr_db: float
    worst_row_db: float


def standard_weight(
    array: NDArray[Any], layout: Layout, granularity: Granularity, grid: Grid
) -> StandardWeight:
    """The weight in these integers; 4 bits of a matrix are in blocks along K."""
    axis: int | None = layout.channel_axis
    block = rows = None
    if isinstance(granularity, PerBlock):
        axis = layout.perm[-1]
        block = granularity.size
    elif granularity == PerTensor():
        axis = None
    elif not layout.has_one_channel_axis(array.shape):
        array, rows, axis = layout.matrix(array), layout, 0
    params = choose_params(*range_of(array, axis, block), grid, axis, block)
    q = quantize(array, params)
    found = dequantize(q, params)
    if rows is None:
        array, found = layout.matrix(array), layout.matrix(found)
    return StandardWeight(q, params, rows, *noise_db(array, found))

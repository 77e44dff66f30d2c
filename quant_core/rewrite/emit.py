"""How a weight lies in the file, and the nodes that turn it back into what its operator takes.

Storage and compute are two decisions. For an integer operator the stored weight becomes int8 and
then DequantizeLinear with one scale per channel, which onnxruntime fuses with the operator. For a
float operator (weight-only) it becomes float32 once, when the session loads, because onnxruntime
folds Cast, Mul, Reshape and Transpose of constants; or, with runtime `qdq`, the standard
DequantizeLinear that other runtimes read and that onnxruntime runs at every inference.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quant_core.model import graph
from quant_core.numerics.affine import Integers, QuantParams
from quant_core.numerics.integer_weight import MIN_SHORT_SCALES, IntegerWeight
from quant_core.numerics.layout import Layout
from quant_core.numerics.levels import EVEN, QMIN4
from quant_core.rewrite.weight_cache import Rounded
from quant_core.rewrite.writer import Cursor


def write_int8(
    write: Cursor, name: str, weight: IntegerWeight, layout: Layout, shape: tuple[int, ...]
) -> ir.Value:
    """The weight as an int8 value in its operator's layout, with a first axis that is split into
    groups; integers that the graph holds already are not written again.

    1. In 8 bits:  int8 constant
    2. From a weight with the same integers that lies in another layout:

        int8 -> Transpose -> int8

    3. In 4 bits, with a multiplier for each block (`_write_products`):

        int4 (C, blocks, n) -> Cast --> Mul -> Reshape -> [Transpose] -> Cast -> int8
        uint4 (C, blocks, 1) -> Cast /

       and with uneven levels, from their table, in the order 0..7, -8..-1:

        int8 (16, 16) -----------------> Gather (C, blocks, 16) -> GatherElements -> Reshape -> ...
        uint4 (C, blocks) -> Cast ------/                         /
        int4 (C, blocks, n) -> Cast -----------------------------/
    """
    key, known = (write.home, weight), write.writer.int8
    if key in known:
        stored, other = known[key]
        if other == layout:
            return stored
        perm = tuple(other.perm[axis] for axis in layout.inverse)
        return write.node("Transpose", [stored], f"{name}_int8", perm=perm)  # 2
    if weight.blocks is not None and weight.multipliers is not None:
        rows = write.writer.tables.get(key)
        stored = _write_products(write, name, weight, rows, layout, shape)
    else:
        stored = write.constant(f"{name}_int8", layout.tensor(weight.q, shape))  # 1
    known[key] = stored, layout
    return stored


def _write_products(
    write: Cursor,
    name: str,
    weight: IntegerWeight,
    rows: ir.Value | None,
    layout: Layout,
    shape: tuple[int, ...],
) -> ir.Value:
    """Rule 3 of `write_int8`: int4 and multipliers, as int8 in the operator's layout."""
    assert weight.blocks is not None
    assert weight.multipliers is not None
    groups = (len(weight.blocks), weight.multipliers.shape[1], -1)
    is_even = weight.levels is EVEN
    uint4 = weight.multipliers.astype(ml_dtypes.uint4)
    multipliers = write.constant(f"{name}_multiplier", uint4[..., None] if is_even else uint4)
    if rows is None:
        int4 = weight.blocks.reshape(groups).astype(ml_dtypes.int4)
        stored = write.constant(f"{name}_int4", int4)
        wide = write.node("Cast", [stored], f"{name}_wide", to=ir.DataType.INT32)
    else:
        wide = write.node("Cast", [rows], f"{name}_wide", to=ir.DataType.INT32)
        blocks = write.constant(f"{name}_groups", np.array(groups, np.int64))
        wide = write.node("Reshape", [wide, blocks], f"{name}_blocks")
    factor = write.node("Cast", [multipliers], f"{name}_factor", to=ir.DataType.INT32)
    if is_even:
        product = write.node("Mul", [wide, factor], f"{name}_product")
    else:
        table = write.shared("levels", np.roll(weight.levels.table, QMIN4, axis=1))
        levels = write.node("Gather", [table, factor], f"{name}_levels")
        product = write.node("GatherElements", [levels, wide], f"{name}_product", axis=2)
    transposed = write.constant(f"{name}_shape", np.array(layout.transposed_shape(shape), np.int64))
    product = write.node("Reshape", [product, transposed], f"{name}_rows")
    if not layout.is_straight:
        product = write.node("Transpose", [product], f"{name}_placed", perm=layout.inverse)
    if is_even:
        product = write.node("Cast", [product], f"{name}_int8", to=ir.DataType.INT8)
    return product


def write_dequantized(write: Cursor, name: str, rounded: Rounded, axis: int) -> ir.Value:
    """The weight for an integer operator, which onnxruntime fuses with the DequantizeLinear: a
    scale per channel, or one.

    int8 (`write_int8`) -> DequantizeLinear(scale, zeros) -> operator
    """
    scale = rounded.integers.scale
    stored = write_int8(write, name, rounded.integers, rounded.layout, rounded.shape)
    scale_value = _scale(write, name, scale)
    return _dequantize(
        write, name, stored, scale_value, _zeros(write, scale), axis if scale.ndim else None
    )


def write_folded(write: Cursor, name: str, rounded: Rounded) -> ir.Value:
    """The weight for a float operator: onnxruntime computes it once, when it loads the model.

    int8 (`write_int8`) -> Cast -> Mul(scale) -> [Reshape] -> operator
    """
    stored = write_int8(write, name, rounded.integers, rounded.layout, rounded.shape)
    per_row = rounded.layout.beside(rounded.integers.scale, rounded.shape)
    scale = _scale(write, name, per_row)
    cast = write.node("Cast", [stored], f"{name}_cast", to=ir.DataType.FLOAT)
    product = write.node("Mul", [cast, scale], f"{name}_float")
    if rounded.layout.groups == 1:
        return product
    whole = write.constant(f"{name}_whole", np.array(rounded.shape, np.int64))
    return write.node("Reshape", [product, whole], f"{name}_ungrouped")


def write_from_rows(
    write: Cursor, name: str, rows: ir.Value, layout: Layout, shape: tuple[int, ...]
) -> ir.Value:
    """A weight of that shape from its rows (C, K).

    rows -> Reshape -> [Transpose] -> [Reshape] -> operator
    """
    transposed = np.array(layout.transposed_shape(shape), np.int64)
    sizes = write.constant(f"{name}_transposed", transposed)
    value = write.node("Reshape", [rows, sizes], f"{name}_rows")
    if not layout.is_straight:
        value = write.node("Transpose", [value], f"{name}_placed", perm=layout.inverse)
    if layout.groups == 1:
        return value
    whole = write.constant(f"{name}_whole", np.array(shape, np.int64))
    return write.node("Reshape", [value, whole], f"{name}_ungrouped")


def write_block_scales(write: Cursor, name: str, rounded: Rounded) -> ir.Value:
    """(N, blocks): the scale of each channel times the multiplier of each block; once for all that
    read them so.

    uint4 (N, blocks) -> Cast -> Mul(scale (N, 1))
    """
    key, known = (write.home, rounded.integers), write.writer.scales
    if key in known:
        return known[key]
    multipliers = rounded.integers.multipliers
    assert multipliers is not None
    factor = write.constant(f"{name}_multiplier", multipliers.astype(ml_dtypes.uint4))
    cast = write.node("Cast", [factor], f"{name}_factor", to=ir.DataType.FLOAT)
    scale = _scale(write, name, rounded.integers.scale[:, None])
    known[key] = write.node("Mul", [cast, scale], f"{name}_block_scales")
    return known[key]


def write_half(write: Cursor, name: str, array: NDArray[Any]) -> ir.Value:
    """A float constant in 16 bits, float32 again once onnxruntime has loaded the model: float16 ->
    Cast.
    """
    stored = write.constant(f"{name}_float16", array.astype(np.float16))
    return write.node("Cast", [stored], f"{name}_cast", to=ir.DataType.FLOAT)


def write_bias(
    write: Cursor,
    name: str,
    bias: NDArray[np.float64],
    x_scale: float,
    weight: ir.Value,
    axis: int | None,
) -> ir.Value:
    """A bias (C,) in int16 steps of its largest value; onnxruntime puts it on its operator's int32
    grid when it loads.

        int16 -> Cast -> Mul(step) -> Div(scale) -> Cast -> DequantizeLinear(scale) -> operator

        scale = w_scale -> Mul(x_scale)

    Its scale is the product of the input's and that of the weight behind the DequantizeLinear
    `weight`. It is in bits of the bias, not of int32: a channel of tiny weights has a huge integer
    there, beside which others would vanish.
    """
    step = np.float32(np.abs(bias).max(initial=0.0) / (2**15 - 1)) or np.float32(1)
    short = np.clip(np.rint(bias / step), -(2**15) + 1, 2**15 - 1).astype(np.int16)
    w_scale = graph.value(weight.producer().inputs[1])  # type: ignore[union-attr]
    input_scale = write.constant(f"{name}_x", np.array(x_scale, np.float32))
    scale = write.node("Mul", [w_scale, input_scale], f"{name}_scale")
    stored = write.constant(f"{name}_int16", short)
    wide = write.node("Cast", [stored], f"{name}_wide", to=ir.DataType.FLOAT)
    step_value = write.constant(f"{name}_step", np.array(step))
    exact = write.node("Mul", [wide, step_value], f"{name}_float")
    steps = write.node("Div", [exact, scale], f"{name}_steps")
    q = write.node("Cast", [steps], f"{name}_q", to=ir.DataType.INT32)
    return _dequantize(write, name, q, scale, None, axis)


def write_int32(
    write: Cursor, name: str, q: NDArray[np.int32], scale: NDArray[np.float32], axis: int | None
) -> ir.Value:
    """A bias as int32, which has no zero point.

    int32 -> DequantizeLinear(scale) -> operator
    """
    stored, scale_value = write.constant(f"{name}_q", q), write.constant(f"{name}_scale", scale)
    return _dequantize(write, name, stored, scale_value, None, axis)


def write_qdq(write: Cursor, name: str, q: Integers, params: QuantParams) -> ir.Value:
    """A constant behind the standard DequantizeLinear (per channel: opset 13; 4 bits and blocks:
    opset 21).

    q -> DequantizeLinear(scale, zero) -> operator
    """
    stored = write.constant(f"{name}_q", q)
    scale = write.constant(f"{name}_scale", params.scale)
    zero = write.constant(f"{name}_zero", params.zero_point)
    return _dequantize(write, name, stored, scale, zero, params.axis, params.block)


def write_pair(write: Cursor, name: str, x: ir.Value, params: QuantParams) -> ir.Value:
    """An activation, quantized and dequantized with the same parameters.

    x -> QuantizeLinear(scale, zero) -> DequantizeLinear(scale, zero) -> readers
    """
    scale = write.constant(f"{name}_scale", params.scale)
    zero = write.constant(f"{name}_zero", params.zero_point)
    q = write.node("QuantizeLinear", [x, scale, zero], f"{name}_q")
    return _dequantize(write, name, q, scale, zero, None)


def write_pairs(write: Cursor, name: str, integers: IntegerWeight) -> ir.Value:
    """uint8 (C, K / 2): two integers of 4 bits in each byte, the first one low, offset by 8; once
    for all that read them so.
    """
    assert integers.blocks is not None
    key, known = (write.home, integers), write.writer.pairs
    if key not in known:
        nibbles = (integers.blocks + 8).astype(np.uint8)
        known[key] = write.constant(f"{name}_pairs", nibbles[:, ::2] | nibbles[:, 1::2] << 4)
    return known[key]


def _scale(write: Cursor, name: str, scale: NDArray[np.float32]) -> ir.Value:
    """The scales of a weight; bfloat16 numbers are stored as such, where that takes fewer bytes."""
    short = scale.astype(ml_dtypes.bfloat16)
    if scale.size < MIN_SHORT_SCALES or not np.array_equal(short.astype(np.float32), scale):
        return write.constant(f"{name}_scale", scale)
    stored = write.constant(f"{name}_bfloat16", short)
    return write.node("Cast", [stored], f"{name}_scale", to=ir.DataType.FLOAT)


def _zeros(write: Cursor, scale: NDArray[np.float32]) -> ir.Value:
    """The zero points of weights: onnxruntime's selectors want them."""
    return write.shared("zeros", np.zeros(scale.shape, np.int8))


def _dequantize(
    write: Cursor,
    name: str,
    q: ir.Value,
    scale: ir.Value,
    zero: ir.Value | None,
    axis: int | None,
    block: int | None = None,
) -> ir.Value:
    attributes = {k: v for k, v in (("axis", axis), ("block_size", block)) if v is not None}
    inputs = [q, scale] if zero is None else [q, scale, zero]
    return write.node("DequantizeLinear", inputs, f"{name}_dq", **attributes)

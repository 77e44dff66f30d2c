"""The patterns of dynamic quantization, which onnxruntime fuses: integers whose activation scale is
found at run time. dynamic.py says which node gets which.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quant_core.calibrate.outliers import reciprocal
from quant_core.model import graph
from quant_core.numerics.integer_weight import IntegerWeight
from quant_core.numerics.layout import Layout
from quant_core.plan.operators import weight_layout
from quant_core.rewrite import emit
from quant_core.rewrite.bias_correction import bias_of
from quant_core.rewrite.weight_cache import Rounded
from quant_core.rewrite.writer import Cursor


@dataclass(frozen=True, slots=True, eq=False)
class DynamicInput:
    """What all products that read one tensor share: that tensor, its channels last, and the outputs
    of its DynamicQuantizeLinear.
    """

    x: ir.Value
    q: ir.Value
    scale: ir.Value
    zero_point: ir.Value


@dataclass(frozen=True, slots=True, eq=False)
class StoredWeight:
    """A weight in the file, for all nodes that share it.

    q       int8 (K, N) of a MatMulInteger, or pairs of int4 (N, blocks, block / 2) of a MatMulNBits
    scales  (N,) or () of int8, (N, blocks) of int4
    """

    q: ir.Value
    scales: ir.Value


def write_input(write: Cursor, x: ir.Value, factors: NDArray[np.float32] | None) -> DynamicInput:
    """An activation that is quantized at run time, after its channels were divided by `factors`
    (K,).

        x -> [Mul(1 / factors)] -> DynamicQuantizeLinear -> q, scale, zero_point

    A channel with factor 0 is multiplied in float (`write_split_product`), and 0 here.
    """
    smooth = x
    if factors is not None:
        divisors = write.constant(f"{x.name}_smoothing", reciprocal(factors))
        smooth = write.node("Mul", [x, divisors], f"{x.name}_smoothed")
    names = [f"{x.name}_dynamic", f"{x.name}_dynamic_scale", f"{x.name}_dynamic_zero_point"]
    return DynamicInput(x, *write.nodes("DynamicQuantizeLinear", [smooth], names))


def write_weight(write: Cursor, name: str, integers: IntegerWeight, layout: Layout) -> StoredWeight:
    """A weight as int8 (K, C), which MatMulInteger takes, and its scales.

    layout  of (K, C): how it becomes the rows that the integers are, which may be those of its
            transpose
    """
    shape = tuple(integers.q.shape[axis] for axis in layout.inverse)
    q = emit.write_int8(write, name, integers, layout, shape)
    return StoredWeight(q, write.constant(f"{name}_scale", integers.scale))


def write_pixel_weight(write: Cursor, name: str, rounded: Rounded) -> StoredWeight:
    """A weight (C, K, 1, ...) of a Conv as int8 (K, C), and its scales."""
    stored = emit.write_int8(write, name, rounded.integers, rounded.layout, rounded.shape)
    matrix = write.constant(f"{name}_matrix", np.array(rounded.shape[:2], np.int64))
    rows = write.node("Reshape", [stored, matrix], f"{name}_rows")
    q = write.node("Transpose", [rows], f"{name}_columns", perm=(1, 0))
    return StoredWeight(q, write.constant(f"{name}_scale", rounded.integers.scale))


def write_matmul(
    write: Cursor,
    node: ir.Node,
    x: DynamicInput,
    weight: StoredWeight,
    factors: NDArray[np.float32] | None,
) -> ir.Node:
    """MatMul or Gemm in a pattern that fuses into one kernel; returns the MatMulInteger.

    product in float -> [Add bias] -> y
    """
    product, y = write_product(write, node, x, weight, factors)
    bias = bias_of(node)
    if bias is not None:
        y = write.node("Add", [y, bias], f"{node.name}_biased")
    graph.replace_value(node.outputs[0], y)
    return _producer(product)


def write_product(
    write: Cursor,
    node: ir.Node,
    x: DynamicInput,
    weight: StoredWeight,
    factors: NDArray[np.float32] | None,
) -> tuple[ir.Value, ir.Value]:
    """The product of integers, and the same in float.

        x.q, weight.q, x.zero_point -> MatMulInteger -> Cast -> Mul -> [Add split]
                          x.scale, weight.scales -> Mul /

    1. The product of integers is scaled by the product of both scales.
    2. The product of the channels that are split off, where `factors` (K,) are 0, is added.
    """
    inputs = [x.q, weight.q, x.zero_point]
    product = write.node("MatMulInteger", inputs, f"{node.name}_integer")
    cast = write.node("Cast", [product], f"{node.name}_cast", to=ir.DataType.FLOAT)
    scale = write.node("Mul", [x.scale, weight.scales], f"{node.name}_scale")
    y = write.node("Mul", [cast, scale], f"{node.name}_scaled")  # 1
    if factors is not None and not factors.all():
        split = write_split_product(write, node, x.x, factors)
        y = write.node("Add", [y, split], f"{node.name}_joined")  # 2
    return product, y


def write_pointwise(
    write: Cursor,
    node: ir.Node,
    rank: int,
    x: DynamicInput,
    weight: StoredWeight,
    bias: NDArray[Any] | None,
    factors: NDArray[np.float32] | None,
) -> ir.Node:
    """A 1x1 Conv in the same pattern; returns the MatMulInteger.

        x (N, ..., C) as integers, weight -> product in float -> [Add bias] -> Transpose -> y

    rank  of y
    """
    product, y = write_product(write, node, x, weight, factors)
    if bias is not None:
        value = write.constant(f"{node.name}_bias", bias.astype(np.float32))
        y = write.node("Add", [y, value], f"{node.name}_biased")
    y = write.node("Transpose", [y], f"{node.name}_pixels", perm=(0, rank - 1, *range(1, rank - 1)))
    graph.replace_value(node.outputs[0], y)
    return _producer(product)


def write_split_product(
    write: Cursor, node: ir.Node, x: ir.Value, factors: NDArray[np.float32]
) -> ir.Value:
    """The product of the channels of x that are split off (factor 0), in float.

    x -> Gather(channels) -> MatMul(their rows of the weight)
    """
    weight = graph.value(node.inputs[1])
    channels = np.flatnonzero(factors == 0)
    rows = weight_layout(node, weight).matrix(graph.array(weight))
    indices = write.constant(f"{node.name}_split", channels)
    picked = write.node("Gather", [x, indices], f"{node.name}_outliers", axis=-1)
    few = write.constant(f"{weight.name}_split", np.ascontiguousarray(rows[:, channels].T))
    return write.node("MatMul", [picked, few], f"{node.name}_split_product")


def write_block_weight(write: Cursor, name: str, rounded: Rounded) -> StoredWeight:
    """A weight in blocks of 4 bits as MatMulNBits takes it: two of them in a byte, offset by 8, the
    first one low.

    The scales are made by nodes, which take fewer bytes. A session without optimizers leaves them
    to nodes, and onnxruntime 1.32 then packs a weight that is a constant with no scales at all: its
    outputs are wrong (tests/facts). So the weight comes through a Reshape, which any other
    session folds; a table has the same rows.
    """
    multipliers = rounded.integers.multipliers
    assert multipliers is not None
    rows = emit.write_pairs(write, name, rounded.integers)
    blocks = write.constant(f"{name}_blocks", np.array([*multipliers.shape, -1], np.int64))
    q = write.node("Reshape", [rows, blocks], f"{name}_pairs")
    return StoredWeight(q, emit.write_block_scales(write, name, rounded))


def write_blocks(
    write: Cursor,
    node: ir.Node,
    rounded: Rounded,
    weight: StoredWeight,
    bias: NDArray[Any] | None,
) -> ir.Node:
    """MatMul or Gemm as com.microsoft.MatMulNBits, whose weight stays in 4 bits in memory too;
    returns that node.

        x, weight.q, weight.scales -> MatMulNBits -> [Add bias] -> y

    A block's scale is that of its channel times its multiplier.
    """
    multipliers = rounded.integers.multipliers
    assert multipliers is not None
    n, k = rounded.integers.q.shape
    product = write.nodes(
        "MatMulNBits",
        [node.inputs[0], weight.q, weight.scales],
        [f"{node.name}_blocks"],
        graph.MICROSOFT,
        K=k,
        N=n,
        bits=4,
        block_size=k // multipliers.shape[1],
        accuracy_level=4,
    )[0]
    y = product
    if bias is not None:
        value = write.constant(f"{node.name}_bias", bias.astype(np.float32))
        y = write.node("Add", [product, value], f"{node.name}_biased")
    graph.replace_value(node.outputs[0], y)
    return _producer(product)


def write_lstm(write: Cursor, node: ir.Node, w: Rounded, r: Rounded) -> ir.Node:
    """com.microsoft.DynamicQuantizeLSTM in place of an LSTM; returns it.

    W (D, K, 4H) and R (D, H, 4H) are in int8 with scales (D, 4H), or (D,), and zero points of 0.
    """
    inputs = [*node.inputs, *[None] * (8 - len(node.inputs))]
    scales: list[ir.Value | None] = []
    for position, rounded in ((1, w), (2, r)):
        name = graph.name_of(node.inputs[position])
        directions, gates, columns = rounded.shape
        in_columns = Layout((0, 2, 1), channel_dims=2)
        shape = (directions, columns, gates)
        found = rounded.integers.scale
        if found.ndim:
            scale = np.ascontiguousarray(found.reshape(directions, gates))
        else:
            scale = np.ascontiguousarray(np.broadcast_to(found, (directions,)))
        inputs[position] = emit.write_int8(write, name, rounded.integers, in_columns, shape)
        scales.append(write.constant(f"{name}_scale", scale))
        scales.append(write.constant(f"{name}_zero_point", np.zeros(scale.shape, np.int8)))
    outputs = [
        ir.Value(
            name=write.writer.free(f"{o.name}_lstm") if o.name else "", type=o.type, shape=o.shape
        )
        for o in node.outputs
    ]
    new = ir.Node(
        graph.MICROSOFT,
        "DynamicQuantizeLSTM",
        [*inputs, *scales],
        [a for a in node.attributes.values() if a.name != "layout"],
        outputs=outputs,
        name=write.writer.free(f"{node.name}_int8"),
    )
    write.insert(new)
    for old, fresh in zip(node.outputs, outputs, strict=True):
        if old.name:
            graph.replace_value(old, fresh)
    return new


def _producer(value: ir.Value) -> ir.Node:
    node = value.producer()
    assert node is not None
    return node

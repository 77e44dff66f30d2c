"""What dynamic quantization writes: integers whose activation scale is found at run time, in the patterns that fuse."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quant_core.calibrate.outliers import reciprocal
from quant_core.model import graph
from quant_core.numerics.granularity import Granularity
from quant_core.numerics.weights import Layout, layout_of
from quant_core.plan.types import Storage
from quant_core.rewrite import emit
from quant_core.rewrite.emit import Writer
from quant_core.rewrite.rounding import Rounded, Rounding


def write_matmul(
    model: ir.Model,
    node: ir.Node,
    storage: Storage,
    rounding: Rounding,
    inputs: dict[ir.Value, list[ir.Value]],
    weights: dict[tuple[Any, ...], Any],
    *,
    safe: bool,
    granularity: Granularity | None,
    factors: NDArray[np.float32] | None,
) -> None:
    """MatMul or Gemm as DynamicQuantizeLinear, MatMulInteger, Cast, Mul and Add, which fuse into one kernel.

    `inputs` and `weights` hold what was written before: nodes that read one tensor quantize it once. The input is
    divided by `factors` (K,), which the weight takes up; channels with factor 0 are multiplied in float (outliers.py).
    """
    x, weight = graph.value(node.inputs[0]), graph.value(node.inputs[1])
    rounded = rounding.integers(
        node, weight, storage, safe=safe, granularity=granularity, factors=factors
    )
    key = ("dynamic", rounded.integers)
    if key not in weights:
        first = Writer(model, model.graph[0])
        channels, columns = rounded.integers.q.shape
        weights[key] = (
            emit.write_int8(
                first, str(weight.name), rounded.integers, Layout((1, 0)), (columns, channels)
            ),
            first.constant(f"{weight.name}_scale", rounded.integers.scale),
        )
    w_int8, w_scale = weights[key]
    write = Writer(model, node)
    if x not in inputs:
        smooth = x
        if factors is not None:
            smooth = write.node(
                "Mul",
                [x, write.constant(f"{x.name}_easing", reciprocal(factors))],
                f"{x.name}_eased",
            )
        names = [f"{x.name}_dynamic", f"{x.name}_dynamic_scale", f"{x.name}_dynamic_zero_point"]
        inputs[x] = write.nodes("DynamicQuantizeLinear", [smooth], names)
    x_int8, x_scale, x_zero = inputs[x]
    product = write.node("MatMulInteger", [x_int8, w_int8, x_zero], f"{node.name}_integer")
    cast = write.node("Cast", [product], f"{node.name}_cast", to=ir.DataType.FLOAT)
    scale = write.node("Mul", [x_scale, w_scale], f"{node.name}_scale")
    y = write.node("Mul", [cast, scale], f"{node.name}_scaled")
    if factors is not None and not factors.all():
        y = write.node(
            "Add", [y, _split_product(write, node, x, weight, factors)], f"{node.name}_joined"
        )
    if node.op_type == "Gemm" and len(node.inputs) > 2 and node.inputs[2] is not None:
        y = write.node("Add", [y, node.inputs[2]], f"{node.name}_biased")
    graph.replace_value(node.outputs[0], y)


def _split_product(
    write: Writer, node: ir.Node, x: ir.Value, weight: ir.Value, factors: NDArray[np.float32]
) -> ir.Value:
    """The product of the channels that are split off, in float."""
    channels = np.flatnonzero(factors == 0)
    rows = layout_of(node, 2).matrix(graph.array(weight))
    picked = write.node(
        "Gather",
        [x, write.constant(f"{node.name}_split", channels)],
        f"{node.name}_outliers",
        axis=-1,
    )
    few = write.constant(f"{weight.name}_split", np.ascontiguousarray(rows[:, channels].T))
    return write.node("MatMul", [picked, few], f"{node.name}_split_product")


def takes_blocks(rounded: Rounded) -> bool:
    """Whether MatMulNBits can compute with these blocks: a weight that is rounded in parts may have odd ones."""
    multipliers = rounded.integers.multipliers
    return multipliers is not None and rounded.integers.q.shape[1] // multipliers.shape[1] in (
        16,
        32,
        64,
        128,
        256,
    )


def write_blocks(
    model: ir.Model,
    node: ir.Node,
    rounded: Rounded,
    bias: NDArray[Any] | None,
    weights: dict[tuple[Any, ...], Any],
) -> None:
    """MatMul or Gemm as com.microsoft.MatMulNBits, whose integers stay in 4 bits in memory too: B (N, K / block, ...).

    A block's scale is that of its channel times its multiplier.
    """
    name, integers, write = graph.name_of(node.inputs[1]), rounded.integers, Writer(model, node)
    assert integers.blocks is not None
    assert integers.multipliers is not None
    (n, k), count = integers.blocks.shape, integers.multipliers.shape[1]
    key = ("blocks", integers)
    if key not in weights:
        first = Writer(model, model.graph[0])
        nibbles = (integers.blocks + 8).astype(np.uint8).reshape(n, count, -1)
        weights[key] = (
            first.constant(f"{name}_nibbles", nibbles[..., ::2] | nibbles[..., 1::2] << 4),
            emit.write_block_scales(first, name, rounded),
        )
    y = write.nodes("MatMulNBits", [node.inputs[0], *weights[key]], [f"{node.name}_blocks"], graph.MICROSOFT,
                    K=k, N=n, bits=4, block_size=k // count, accuracy_level=4)[0]  # fmt: skip
    if bias is not None:
        y = write.node(
            "Add",
            [y, write.constant(f"{node.name}_bias", bias.astype(np.float32))],
            f"{node.name}_biased",
        )
    graph.replace_value(node.outputs[0], y)


def write_lstm(
    model: ir.Model,
    node: ir.Node,
    rounding: Rounding,
    *,
    safe: bool,
    granularity: Granularity | None,
) -> None:
    """com.microsoft.DynamicQuantizeLSTM: W (D, K, 4H) and R (D, H, 4H) in int8 with scales (D, 4H), or (D,)."""
    write = Writer(model, node)
    inputs = [*node.inputs, *[None] * (8 - len(node.inputs))]
    scales: list[ir.Value | None] = []
    for position in (1, 2):
        weight = graph.value(node.inputs[position])
        directions, gates, columns = graph.shape_of(weight)
        found = rounding.integers(
            node, weight, Storage.INT8, safe=safe, granularity=granularity
        ).integers
        q = found.q.reshape(directions, gates, columns).transpose(0, 2, 1)
        each = (directions, gates) if found.scale.ndim else (directions,)
        scale = np.ascontiguousarray(
            found.scale.reshape(each) if found.scale.ndim else np.broadcast_to(found.scale, each)
        )
        inputs[position] = write.constant(f"{weight.name}_int8", q)
        scales += [write.constant(f"{weight.name}_scale", scale),
                   write.constant(f"{weight.name}_zero_point", np.zeros(scale.shape, np.int8))]  # fmt: skip
    outputs = [
        ir.Value(name=write.free(f"{o.name}_lstm"), type=o.type, shape=o.shape)
        for o in node.outputs
    ]
    attributes = [a for a in node.attributes.values() if a.name != "layout"]
    new = ir.Node(graph.MICROSOFT, "DynamicQuantizeLSTM", [*inputs, *scales], attributes, outputs=outputs,
                  name=write.free(f"{node.name}_int8"))  # fmt: skip
    graph.home(node).insert_before(node, new)
    for old, fresh in zip(node.outputs, outputs, strict=True):
        graph.replace_value(old, fresh)

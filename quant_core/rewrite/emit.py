"""How a weight lies in the file, and the nodes that turn it back into what its operator takes.

Storage and compute are two decisions. For an integer operator the stored weight becomes int8 and then DequantizeLinear
with one scale per channel, which onnxruntime fuses with the operator. For a float operator (weight-only) it becomes
float32 once, when the session loads, because onnxruntime folds Cast, Mul, Reshape and Transpose of constants; or, with
runtime `qdq`, the standard DequantizeLinear that other runtimes read and that onnxruntime runs at every inference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quant_core.model import graph
from quant_core.numerics.weights import IntegerWeight, Layout
from quant_core.rewrite.rounding import Rounded

UNNAMED = ("QuantizeLinear", "DequantizeLinear")  # their outputs' names say all, and there are many


class Writer:
    """Adds initializers with names that are still free, and nodes ahead of one node (or, without one, to `waiting`)."""

    def __init__(self, model: ir.Model, before: ir.Node | None) -> None:
        self.model, self.before = model, before
        self.waiting: list[ir.Node] = []

    def constant(self, name: str, array: NDArray[Any]) -> ir.Value:
        """An initializer of the graph that is written to."""
        return graph.initializer(self._home(), self.free(name), array)

    def zeros(self, shape: tuple[int, ...]) -> ir.Value:
        """int8 zeros, the zero point of weights; onnxruntime's selectors want one, so all weights share it."""
        known, key = self.model.meta.setdefault("zeros", {}), (self._home(), shape)
        if key not in known:
            known[key] = self.constant(
                "_".join(map(str, ("zeros", *shape))), np.zeros(shape, np.int8)
            )
        found: ir.Value = known[key]
        return found

    def tables(self) -> dict[IntegerWeight, ir.Value]:
        """The rows (C, K) of tables that were written here, which may be the weight of another operator too."""
        found: dict[IntegerWeight, ir.Value] = self.model.meta.setdefault(
            f"tables {id(self._home())}", {}
        )
        return found

    def node(
        self, op_type: str, inputs: Sequence[ir.Value | None], name: str, **attributes: Any
    ) -> ir.Value:
        """The one output of a new node."""
        return self.nodes(op_type, inputs, [name], **attributes)[0]

    def nodes(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        names: Sequence[str],
        domain: str = "",
        **attributes: Any,
    ) -> list[ir.Value]:
        """The outputs of a new node; attributes are integers or lists of them."""
        attrs = [
            ir.AttrInt64s(k, v) if isinstance(v, tuple) else ir.AttrInt64(k, v)
            for k, v in attributes.items()
        ]
        outputs = [ir.Value(name=self.free(n)) for n in names]
        name = None if op_type in UNNAMED else outputs[0].name
        node = ir.Node(domain, op_type, inputs, attrs, outputs=outputs, name=name)
        if self.before is None:
            self.waiting.append(node)
        else:
            assert self.before.graph is not None
            self.before.graph.insert_before(self.before, node)
        return outputs

    def _home(self) -> ir.Graph:
        # onnxruntime does not find the integers of a DequantizeLinear in a branch among the outer graph's initializers
        return self.model.graph if self.before is None else graph.home(self.before)

    def free(self, name: str) -> str:
        """The name, with a number behind it if a value has it already."""
        taken = self.model.meta.setdefault("names", set())
        if not taken:
            for g in graph.graphs_of(self.model):
                taken |= (
                    set(g.initializers)
                    | {v.name for v in g.inputs}
                    | {v.name for n in g for v in n.outputs}
                )
        found, n = name, 1
        while found in taken:
            found, n = f"{name}_{n}", n + 1
        taken.add(found)
        return found


def write_int8(
    write: Writer, name: str, weight: IntegerWeight, layout: Layout, shape: tuple[int, ...]
) -> ir.Value:
    """The weight as an int8 value in its operator's layout; from the rows of a table, where that holds the same."""
    rows = write.tables().get(weight)
    if weight.blocks is None or weight.multipliers is None:
        if rows is None:
            return write.constant(f"{name}_int8", layout.tensor(weight.q, shape))
        straight = layout.inverse == tuple(range(len(shape)))
        return (
            rows
            if straight
            else write.node("Transpose", [rows], f"{name}_int8", perm=layout.inverse)
        )
    groups = (len(weight.blocks), weight.multipliers.shape[1], -1)
    multipliers = write.constant(
        f"{name}_multiplier", weight.multipliers[..., None].astype(ml_dtypes.uint4)
    )
    if rows is None:
        stored = write.constant(
            f"{name}_int4", weight.blocks.reshape(groups).astype(ml_dtypes.int4)
        )
        wide = write.node("Cast", [stored], f"{name}_wide", to=ir.DataType.INT32)
    else:
        wide = write.node("Cast", [rows], f"{name}_wide", to=ir.DataType.INT32)
        blocks = write.constant(f"{name}_groups", np.array(groups, np.int64))
        wide = write.node("Reshape", [wide, blocks], f"{name}_blocks")
    factor = write.node("Cast", [multipliers], f"{name}_factor", to=ir.DataType.INT32)
    product = write.node("Mul", [wide, factor], f"{name}_product")
    moved = write.constant(f"{name}_shape", np.array(layout.moved_shape(shape), np.int64))
    product = write.node("Reshape", [product, moved], f"{name}_rows")
    if layout.inverse != tuple(range(len(shape))):
        product = write.node("Transpose", [product], f"{name}_placed", perm=layout.inverse)
    return write.node("Cast", [product], f"{name}_int8", to=ir.DataType.INT8)


def write_dequantized(write: Writer, name: str, rounded: Rounded, axis: int) -> ir.Value:
    """The weight for an integer operator: int8 behind a DequantizeLinear with a scale per channel, or one."""
    scale = rounded.integers.scale
    stored = write_int8(write, name, rounded.integers, rounded.layout, rounded.shape)
    scale_value = _scale(write, name, scale, rounded)
    return _dequantize(
        write, name, stored, scale_value, write.zeros(scale.shape), axis if scale.ndim else None
    )


def write_folded(write: Writer, name: str, rounded: Rounded) -> ir.Value:
    """The weight for a float operator, float32 again once the session has loaded."""
    stored = write_int8(write, name, rounded.integers, rounded.layout, rounded.shape)
    scale = _scale(
        write, name, rounded.layout.beside(rounded.integers.scale, rounded.shape), rounded
    )
    cast = write.node("Cast", [stored], f"{name}_cast", to=ir.DataType.FLOAT)
    return write.node("Mul", [cast, scale], f"{name}_float")


def write_block_scales(write: Writer, name: str, rounded: Rounded) -> ir.Value:
    """(N, blocks): the scale of each channel times the multiplier of each block."""
    multipliers = rounded.integers.multipliers
    assert multipliers is not None
    factor = write.constant(f"{name}_multiplier", multipliers.astype(ml_dtypes.uint4))
    cast = write.node("Cast", [factor], f"{name}_factor", to=ir.DataType.FLOAT)
    scale = _scale(write, name, rounded.integers.scale[:, None], rounded)
    return write.node("Mul", [cast, scale], f"{name}_block_scales")


def write_half(write: Writer, name: str, array: NDArray[Any]) -> ir.Value:
    """A float constant in 16 bits, float32 again once the session has loaded."""
    stored = write.constant(f"{name}_float16", array.astype(np.float16))
    return write.node("Cast", [stored], f"{name}_cast", to=ir.DataType.FLOAT)


def write_half_rows(write: Writer, halved: ir.Value, node: ir.Node) -> ir.Value:
    """Rows of a table that `write_half` wrote, float32 after they are picked: what replaces the Gather's output."""
    table = halved.producer().inputs[0]  # type: ignore[union-attr]
    picked = write.node("Gather", [table, node.inputs[1]], f"{node.name}_float16", axis=0)
    return write.node("Cast", [picked], f"{node.name}_rows", to=ir.DataType.FLOAT)


def write_bias(
    write: Writer,
    name: str,
    bias: NDArray[np.float64],
    x_scale: float,
    weight: ir.Value,
    axis: int | None,
) -> ir.Value:
    """A bias in 16 bits of the largest; on the int32 grid of its operator once the session has loaded.

    Its scale is the product of the input's and that of the weight behind the DequantizeLinear `weight`. It is in bits
    of the bias, not of int32: a channel of tiny weights has a huge integer there, beside which others would vanish.
    """
    step = np.float32(np.abs(bias).max(initial=0.0) / (2**15 - 1)) or np.float32(1)
    short = np.clip(np.rint(bias / step), -(2**15) + 1, 2**15 - 1).astype(np.int16)
    w_scale = graph.value(weight.producer().inputs[1])  # type: ignore[union-attr]
    scale = write.node(
        "Mul",
        [w_scale, write.constant(f"{name}_x", np.array(x_scale, np.float32))],
        f"{name}_scale",
    )
    wide = write.node(
        "Cast", [write.constant(f"{name}_int16", short)], f"{name}_wide", to=ir.DataType.FLOAT
    )
    exact = write.node(
        "Mul", [wide, write.constant(f"{name}_step", np.array(step))], f"{name}_float"
    )
    steps = write.node("Div", [exact, scale], f"{name}_steps")
    return _dequantize(
        write,
        name,
        write.node("Cast", [steps], f"{name}_q", to=ir.DataType.INT32),
        scale,
        None,
        axis,
    )


def write_qdq(
    write: Writer, name: str, q: NDArray[Any], scale: NDArray[np.float32], zero: NDArray[Any],
    axis: int | None = None, block: int | None = None,
) -> ir.Value:  # fmt: skip
    """A constant behind the standard DequantizeLinear (per channel: opset 13; 4 bits and blocks: opset 21).

    int32, which a bias is, has no zero point.
    """
    stored, scale_value = write.constant(f"{name}_q", q), write.constant(f"{name}_scale", scale)
    zero_value = write.constant(f"{name}_zero", zero) if q.dtype != np.int32 else None
    return _dequantize(write, name, stored, scale_value, zero_value, axis, block)


def write_pair(
    write: Writer, name: str, x: ir.Value, scale: NDArray[np.float32], zero_point: NDArray[Any]
) -> ir.Value:
    """An activation, quantized and dequantized with the same parameters."""
    scale_value = write.constant(f"{name}_scale", scale)
    zero = write.constant(f"{name}_zero", zero_point)
    q = write.node("QuantizeLinear", [x, scale_value, zero], f"{name}_q")
    return _dequantize(write, name, q, scale_value, zero, None)


def write_rows(write: Writer, name: str, rounded: Rounded, node: ir.Node) -> ir.Value:
    """Rows of an int8 or int4 table, scaled after they are picked: the table itself is never dequantized.

    Returns the value that replaces the Gather's output. The table is (rows, width), the axis 0.
    """
    ids, weight, tables = node.inputs[1], rounded.integers, write.tables()
    if weight not in tables:
        rows = weight.blocks.astype(ml_dtypes.int4) if weight.blocks is not None else None
        stored = rounded.layout.tensor(weight.q, rounded.shape) if rows is None else rows
        tables[weight] = write.constant(f"{name}_{'int8' if rows is None else 'int4'}", stored)
    if weight.multipliers is not None:
        scales, block = (
            write_block_scales(write, name, rounded),
            rounded.shape[1] // weight.multipliers.shape[1],
        )
        return write.nodes("GatherBlockQuantized", [tables[weight], ids, scales], [f"{node.name}_rows"],
                           graph.MICROSOFT, gather_axis=0, quantize_axis=1, block_size=block)[0]  # fmt: skip
    picked = write.node("Gather", [tables[weight], ids], f"{node.name}_int8", axis=0)
    cast = write.node("Cast", [picked], f"{node.name}_cast", to=ir.DataType.FLOAT)
    if weight.scale.ndim == 0 or rounded.layout.perm == (1, 0):  # one for all, or one per column
        return write.node(
            "Mul", [cast, write.constant(f"{name}_scale", weight.scale)], f"{node.name}_rows"
        )
    factor = write.constant(f"{name}_scale", weight.scale[:, None])
    factor = write.node("Gather", [factor, ids], f"{node.name}_scale", axis=0)
    return write.node("Mul", [cast, factor], f"{node.name}_rows")


def _scale(write: Writer, name: str, scale: NDArray[np.float32], rounded: Rounded) -> ir.Value:
    """The scales of a weight; those beside four bits are bfloat16 numbers, and stored as such."""
    if rounded.integers.blocks is None:
        return write.constant(f"{name}_scale", scale)
    short = write.constant(f"{name}_bfloat16", scale.astype(ml_dtypes.bfloat16))
    return write.node("Cast", [short], f"{name}_scale", to=ir.DataType.FLOAT)


def _dequantize(
    write: Writer,
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

"""How the rows of a table are picked from integers or float16, and become float32 after that."""

from __future__ import annotations

import ml_dtypes
import onnx_ir as ir

from quant_core.model import graph
from quant_core.rewrite import emit
from quant_core.rewrite.weight_cache import Rounded
from quant_core.rewrite.writer import Cursor


def write_rows(
    write: Cursor,
    home: Cursor,
    name: str,
    rounded: Rounded,
    node: ir.Node,
    *,
    as_pairs: bool,
) -> ir.Value:
    """What replaces the output of a Gather: rows are scaled after they are picked, so the table
    stays integers.

    1. A matrix in 4 bits:    int4 (rows, width) -> GatherBlockQuantized(ids, block scales)
       or, five times as fast:  uint8 pairs of them (rows, width / 2)
    2. A scale per column:    int8 (rows, width) -> Gather(ids) -> Cast -> Mul(scale (width,))
    3. A scale per row:       int8 (rows, width) -> Gather(ids) -> Cast -> Mul
                              scale (rows, 1)    -> Gather(ids) ---------> /

    A stack in 4 bits is int8 once onnxruntime has loaded it (`write_int8`): GatherBlockQuantized
    takes a hundred times as long as Gather where rows are whole matrices.

    home      where the table is written: branches of the graph that it is in share it
    as_pairs  whether nobody reads a matrix in 4 bits as int4
    """
    ids, weight, key = node.inputs[1], rounded.integers, (home.home, rounded.integers)
    if weight.multipliers is not None and len(rounded.shape) == 2:  # 1
        if as_pairs:
            table = emit.write_pairs(home, name, weight)
        else:
            table = _write_table(home, name, rounded)
        return write.nodes(
            "GatherBlockQuantized",
            [table, ids, emit.write_block_scales(home, name, rounded)],
            [f"{node.name}_rows"],
            graph.MICROSOFT,
            bits=4,
            gather_axis=0,
            quantize_axis=1,
            block_size=rounded.shape[1] // weight.multipliers.shape[1],
        )[0]
    table = _write_table(home, name, rounded)
    picked = write.node("Gather", [table, ids], f"{node.name}_int8", axis=0)
    cast = write.node("Cast", [picked], f"{node.name}_cast", to=ir.DataType.FLOAT)
    scale = rounded.layout.beside(weight.scale, rounded.shape)
    is_per_row = scale.ndim > 0 and scale.shape[0] == rounded.shape[0]
    if not is_per_row and scale.ndim:
        scale = scale[0]  # without the axis of rows, which a single id does not pick
    if key not in write.writer.scales:
        write.writer.scales[key] = home.constant(f"{name}_scale", scale)
    factor = write.writer.scales[key]  # 2
    if is_per_row:  # 3
        factor = write.node("Gather", [factor, ids], f"{node.name}_scale", axis=0)
    return write.node("Mul", [cast, factor], f"{node.name}_rows")


def write_half_rows(write: Cursor, halved: ir.Value, node: ir.Node) -> ir.Value:
    """What replaces the output of a Gather whose table `write_half` wrote: rows are cast after they
    are picked.

    float16 (rows, width) -> Gather(ids) -> Cast
    """
    table = halved.producer().inputs[0]  # type: ignore[union-attr]
    picked = write.node("Gather", [table, node.inputs[1]], f"{node.name}_float16", axis=0)
    return write.node("Cast", [picked], f"{node.name}_rows", to=ir.DataType.FLOAT)


def _write_table(write: Cursor, name: str, rounded: Rounded) -> ir.Value:
    """The rows of a table as int4 or int8, once for all that read them so."""
    weight, key, known = rounded.integers, (write.home, rounded.integers), write.writer.tables
    if key not in known:
        if weight.blocks is not None and len(rounded.shape) == 2:
            known[key] = write.constant(f"{name}_int4", weight.blocks.astype(ml_dtypes.int4))
        else:
            known[key] = emit.write_int8(write, name, weight, rounded.layout, rounded.shape)
    return known[key]

"""Nodes that draw random numbers get the same ones in each run, so that two models can be compared.

    x -> RandomNormalLike -> y    =>    Size(x) -> Range -> Mod -> Gather(table) -> Reshape -> y

A voice that is made of noise never comes out twice: nothing could be said of what rounding does to
it, nor whether a rewrite is exact. Models are run so; no file is written so.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from quant_core.model import files, graph
from quant_core.model.proto import from_proto

OPSET_RANGE = 11  # the first with Range
NORMAL = ("RandomNormal", "RandomNormalLike")
UNIFORM = ("RandomUniform", "RandomUniformLike")
DRAW_NUMBERS = (*NORMAL, *UNIFORM)  # the operators that draw floats
COUNT = 1 << 18  # numbers of a table; what takes more begins anew


def with_fixed_noise(model: ir.Model | Path | bytes) -> ir.Model | None:
    """A copy whose random nodes read a table in place of drawing; None if it has no such node.

    1. Each begins at the start of the table: after rewrites nobody knows which node was which.
    2. Nodes of local functions, and those that draw classes or drop values, stay as they are.
    """
    if isinstance(model, Path):
        model = files.load(model)
    elif isinstance(model, bytes):
        model = from_proto(onnx.load_model_from_string(model))
    if not any(graph.nodes_of(model, *DRAW_NUMBERS)) or graph.opset(model) < OPSET_RANGE:
        return None
    copy = model.clone()
    for node in graph.nodes_of(copy, *DRAW_NUMBERS):
        _fix(copy.graph, node)
    return copy


def _fix(main: ir.Graph, node: ir.Node) -> None:
    """Edit in place: the node's output is read from a table, in its distribution, shape and type.

    Source: ONNX operators RandomNormal and RandomUniform, opset 1, and those that end in Like.
    """
    table, inside, y = _table(node), graph.home(node), node.outputs[0]
    dtype = ir.DataType(graph.attribute(node, "dtype", ir.DataType.FLOAT))
    made: list[ir.Node] = []
    if not node.inputs:
        drawn = _constant(main, y, "drawn", np.resize(table, graph.attribute(node, "shape", ())))
    else:
        x = graph.value(node.inputs[0])
        if "dtype" not in node.attributes and x.dtype is not None:
            dtype = x.dtype
        zero, one, count = (_constant(main, y, str(n), np.array(n)) for n in (0, 1, COUNT))
        numbers = _constant(main, y, "table", table)
        size, shape = ir.node("Size", [x]), ir.node("Shape", [x])
        places = ir.node("Range", [zero, size.outputs[0], one])
        wrapped = ir.node("Mod", [places.outputs[0], count])
        taken = ir.node("Gather", [numbers, wrapped.outputs[0]])
        shaped = ir.node("Reshape", [taken.outputs[0], shape.outputs[0]])
        made, drawn = [size, shape, places, wrapped, taken, shaped], shaped.outputs[0]
    cast = ir.node("Cast", [drawn], {"to": dtype})
    for new in (*made, cast):
        new.outputs[0].name = f"{y.name} by {new.op_type}"  # no model has such a name
    inside.insert_before(node, [*made, cast])
    graph.replace_value(y, cast.outputs[0])
    inside.remove(node, safe=True)


def _table(node: ir.Node) -> NDArray[np.float32]:
    """Numbers in the distribution of a random node."""
    is_normal = node.op_type in NORMAL
    first, second = (("mean", 0.0), ("scale", 1.0)) if is_normal else (("low", 0.0), ("high", 1.0))
    parameters = graph.attribute(node, *first), graph.attribute(node, *second)
    rng = np.random.default_rng(0)
    numbers = (rng.normal if is_normal else rng.uniform)(*parameters, COUNT)
    return numbers.astype(np.float32)


def _constant(main: ir.Graph, y: ir.Value, what: str, array: NDArray[Any]) -> ir.Value:
    """A constant that graphs inside nodes read too."""
    return graph.initializer(main, f"{y.name} by {what}", array)

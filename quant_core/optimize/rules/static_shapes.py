"""Shapes that are computed at every run, although the graph fixes them."""

from __future__ import annotations

from math import prod

import numpy as np
import onnx_ir as ir

from quant_core.model import graph
from quant_core.optimize.applied import Applied
from quant_core.optimize.edit import constant, remove
from quant_core.optimize.facts import Dims, Facts


def static_shapes(model: ir.Model, facts: Facts) -> list[Applied]:
    """Reshapes to a computed shape get a constant one; an Expand that expands nothing goes.

        Shape(x) -> Gather, Concat, ... -> Reshape(x, .)   =>   Reshape(x, [0, 0, 12, 32])

    1. An axis of known size is written as it is, one that has the size of the input's axis at the
       same place as 0.
    2. One axis may be left. Its size is what the known sizes of the input leave, or else -1.
    """
    applied = []
    for node in graph.nodes_of(model, "Reshape", "Expand"):
        if graph.is_constant(node.inputs[1]) or graph.attribute(node, "allowzero", 0):
            continue
        here, there = facts.dims(node.inputs[0]), facts.dims(node.outputs[0])
        if here is None or there is None:
            continue
        if node.op_type == "Expand":
            if here == there and None not in here and not node.outputs[0].is_graph_output():
                node.outputs[0].replace_all_uses_with(graph.value(node.inputs[0]))
                remove([node])
                applied.append(Applied("static_shapes", str(node.name), ()))
            continue
        target = target_of(here, there)
        if target is not None:
            shape = constant(graph.home(node), f"{node.name}_shape", np.array(target, np.int64))
            node.replace_input_with(1, shape)
            applied.append(Applied("static_shapes", str(node.name), ()))
    return applied


def target_of(here: Dims, there: Dims) -> list[int] | None:
    """The constant shape of a Reshape between these, None if two axes or more are left."""
    target, open_axes = [], []
    for axis, size in enumerate(there):
        if isinstance(size, int) and size > 0:
            target.append(size)
        elif isinstance(size, str) and axis < len(here) and here[axis] == size:
            target.append(0)  # 1.
        else:
            target.append(-1)
            open_axes.append(axis)
    if len(open_axes) > 1:
        return None
    if open_axes:  # 2.
        names = sorted(n for n in here if isinstance(n, str))
        copied = sorted(n for i, n in enumerate(there) if i not in open_axes and isinstance(n, str))
        if names == copied and None not in here:
            before = prod(n for n in here if isinstance(n, int))
            after = prod(n for n in target if n > 0)
            target[open_axes[0]] = before // after
    return target

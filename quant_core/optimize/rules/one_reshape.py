"""Rows of operators that only give a tensor another shape become one, or none."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from quant_core.model import graph
from quant_core.optimize.applied import Applied
from quant_core.optimize.edit import axes_of, constant, put_before, put_in_place, remove
from quant_core.optimize.facts import Facts
from quant_core.optimize.rules.static_shapes import target_of

RESHAPING = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze"})
REDUCING = frozenset({"ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd"})


def one_reshape(model: ir.Model, facts: Facts) -> list[Applied]:
    """What follows the state of a recurrent layer, or the branches of an If that is gone.

        x(1, 128, 1) -> Squeeze(2) -> Unsqueeze(0)   =>   Reshape(x, [1, 1, 128])
        x -> Squeeze(0) -> Unsqueeze(0) -> y         =>   x
        x -> Gather(i) -> Unsqueeze(0)               =>   Gather(x, [i])

    1. A reduction over axes of one entry gives another shape, and nothing else.
    2. The shapes of x and of the result are known but for one size, or sizes that stay in place.
    3. Of two shapes in a row one goes; a single one only if it changes nothing.
    4. A Gather of one position whose axis all readers put back keeps that axis.
    """
    applied = []
    for node in graph.nodes_of(model):
        inside = graph.home(node)
        change = _chosen(inside, node, facts) or _reshaped(inside, node, facts)
        applied += [change] if change else []
    return applied


def _only_reshapes(node: ir.Node | None, facts: Facts) -> bool:
    if node is None or node.domain:
        return False
    if node.op_type not in REDUCING:
        return node.op_type in RESHAPING
    sizes, axes = facts.shape(node.inputs[0]), axes_of(node)
    return sizes is not None and bool(axes) and all(sizes[axis] == 1 for axis in axes or ())  # 1.


def _reshaped(inside: ir.Graph, last: ir.Node, facts: Facts) -> Applied | None:
    """The row that ends at this node becomes one Reshape, or nothing."""
    if not _only_reshapes(last, facts):
        return None
    row = [last]
    while True:
        before = graph.value(row[0].inputs[0]).producer()
        if before is None or before.graph is not inside or not _only_reshapes(before, facts):
            break
        row.insert(0, before)
    source, output, name = graph.value(row[0].inputs[0]), last.outputs[0], str(last.name)
    here, there = facts.dims(source), facts.dims(output)
    if here is None or there is None or graph.is_constant(source):
        return None
    gone: list[ir.Node] = []
    for node, reader in zip(row[-2::-1], row[:0:-1], strict=True):
        if graph.only_reader(node.outputs[0]) is not reader:
            break
        gone.insert(0, node)
    names = tuple(str(n.name) for n in gone)
    if here == there and None not in here and not output.is_graph_output():
        output.replace_all_uses_with(source)
        remove([*gone, last])
        return Applied("one_reshape", name, names)
    target = target_of(here, there)
    if not gone or target is None:
        return None
    shape = constant(inside, f"{name}_shape", np.array(target, np.int64))
    new = ir.Node("", "Reshape", [source, shape], name=name)
    put_in_place([*gone, last], new)
    return Applied("one_reshape", name, names)


def _chosen(inside: ir.Graph, node: ir.Node, facts: Facts) -> Applied | None:
    """A Gather whose readers put back the axis that it takes away (4.)."""
    if node.op_type != "Gather" or node.domain or graph.is_constant(node.inputs[0]):
        return None
    position, rank = graph.constant(node.inputs[1]), facts.rank(node.inputs[0])
    readers, value = graph.consumers(node.outputs[0]), node.outputs[0]
    if position is None or position.ndim or rank is None or not readers or value.is_graph_output():
        return None
    axis = graph.attribute(node, "axis", 0) % rank
    for reader in readers:
        axes = axes_of(reader) if reader.op_type == "Unsqueeze" and not reader.domain else None
        is_here = reader.graph is inside and not reader.outputs[0].is_graph_output()
        if not is_here or axes is None or [a % rank for a in axes] != [axis]:
            return None
    indices = constant(inside, f"{node.name}_position", position.reshape(1))
    new = ir.Node("", "Gather", [node.inputs[0], indices], node.attributes.values(), name=node.name)
    rows = put_before(node, new, str(value.name))
    for reader in readers:
        reader.outputs[0].replace_all_uses_with(rows)
    remove([node, *readers])
    return Applied("one_reshape", str(node.name), tuple(str(r.name) for r in readers))

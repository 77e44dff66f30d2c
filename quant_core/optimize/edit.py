"""Small questions to a graph, and small changes of it, that the rules share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quant_core.model import graph

TAKEN = "quantmill.names"  # key in the meta of a graph: names that `free_name` does not give again


def is_float32(value: ir.Value | None) -> bool:
    """Whether the value is a float32 constant, without reading it."""
    return graph.is_constant(value) and value.const_value.dtype == ir.DataType.FLOAT  # type: ignore[union-attr]


def read_here(value: ir.Value, inside: ir.Graph) -> bool:
    """Whether only nodes of this graph read the value, and no output of a graph is made of it."""
    return not value.is_graph_output() and all(u.node.graph is inside for u in value.uses())


def numbers(value: ir.Value) -> NDArray[np.float64]:
    """A copy of a constant in float64."""
    return np.array(graph.array(value), np.float64)


def axes_of(node: ir.Node) -> list[int] | None:
    """The axes that an attribute or a constant second input names, None if they are computed."""
    if "axes" in node.attributes:
        return list(graph.attribute(node, "axes", ()))
    array = graph.constant(graph.input_at(node, 1))
    return None if array is None else [int(n) for n in array.reshape(-1)]


def constant(inside: ir.Graph, like: str, array: NDArray[Any]) -> ir.Value:
    """A new initializer, named after another tensor; floats become float32."""
    if array.dtype.kind == "f":
        array = array.astype(np.float32)
    return graph.initializer(inside, free_name(inside, like), np.asarray(array, order="C"))


def replace_constant(value: ir.Value, array: NDArray[Any]) -> None:
    """The initializer holds another float32 array from now on, for all its readers."""
    array = np.asarray(array, np.float32, order="C")
    value.const_value = ir.tensor(array, name=value.name)
    value.shape, value.type = ir.Shape(array.shape), ir.TensorType(ir.DataType.FLOAT)


def free_name(inside: ir.Graph, like: str) -> str:
    """`like` with the first number behind it that no value and no node of the graph has; none of
    the model while its names are known.
    """
    known = inside.meta.get(TAKEN)
    taken = _names([inside, *graph.graphs_inside(inside)]) if known is None else known
    name, n = f"{like}_opt", 1
    while name in taken:
        name, n = f"{like}_opt{n}", n + 1
    taken.add(name)
    return name


@contextmanager
def names_known(model: ir.Model) -> Iterator[None]:
    """While it lasts, `free_name` knows the names of the model, and those that it gave before."""
    graphs = list(graph.graphs_of(model))
    names = _names(graphs)
    for inside in graphs:
        inside.meta[TAKEN] = names
    try:
        yield
    finally:
        for inside in graphs:
            del inside.meta[TAKEN]


def _names(graphs: Iterable[ir.Graph]) -> set[str]:
    """The names of all values and nodes."""
    found = set[str]()
    for inside in graphs:
        found.update(str(v.name) for v in (*inside.inputs, *inside.initializers.values()))
        for node in inside:
            found.add(str(node.name))
            found.update(str(v.name) for v in (*node.outputs, *node.inputs) if v is not None)
    return found


def transpose(x: ir.Value, perm: Iterable[int], name: str | None = None) -> ir.Node:
    """A new Transpose, in no graph yet."""
    return ir.Node("", "Transpose", [x], [ir.AttrInt64s("perm", tuple(perm))], name=name)


def put_before(near: ir.Node, node: ir.Node, like: str) -> ir.Value:
    """The result of a new node, which stands before another from now on.

    It has a name after `like`, and the type of the other's result. So has a node without a name.
    """
    inside, output = graph.home(near), node.outputs[0]
    output.name, output.type = free_name(inside, like), near.outputs[0].type
    node.name = node.name or output.name
    inside.insert_before(near, node)
    return output


def put_in_place(old: Sequence[ir.Node], *new: ir.Node) -> None:
    """The new nodes stand where the last of the old ones stood, whose result the last of them gives
    from now on; the old ones, of which nothing else is read, leave their graph.

    The new ones have one output each, of the type and shape of that result.
    """
    end, result = old[-1], old[-1].outputs[0]
    for node in new:
        put_before(end, node, str(node.name)).shape = result.shape
    graph.replace_value(result, new[-1].outputs[0])
    remove(old)


def remove(nodes: Iterable[ir.Node]) -> None:
    """Nodes that nothing reads any more leave their graph, the last first."""
    for node in reversed(list(nodes)):
        graph.home(node).remove(node, safe=True)


def bypass(output: ir.Value, source: ir.Value) -> None:
    """Readers of `output` read `source`, which gets the name of a graph's output."""
    if output.is_graph_output():
        graph.replace_value(output, source)
    else:
        output.replace_all_uses_with(source)

"""A part of a graph that sees its tensors in another form, which they get where they enter it."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from quant_core.model import graph
from quant_core.optimize.edit import free_name

# Operators whose kernel moves over the image axes.
SPATIAL = frozenset({"Conv", "MaxPool", "AveragePool"})
# Those that compute each number alone, or each channel.
SAME = frozenset(
    {"Relu", "LeakyRelu", "Sigmoid", "Tanh", "HardSigmoid", "Elu", "Selu", "Softplus", "Clip",
     "Neg", "Abs", "Exp", "Sqrt", "Identity", "BatchNormalization", "GlobalAveragePool",
     "GlobalMaxPool"}
)  # fmt: skip
# Those that compute numbers of the same place of several tensors.
PAIRS = frozenset({"Add", "Sub", "Mul", "Div", "PRelu", "Max", "Min", "Sum"})


def data_of(node: ir.Node) -> list[ir.Value]:
    """The computed tensors that the node reads along with the image axes."""
    some = node.inputs if node.op_type in PAIRS or node.op_type == "Concat" else node.inputs[:1]
    return [v for v in some if v is not None and not graph.is_constant(v)]


def has_own_weight(conv: ir.Node) -> bool:
    """Whether the weight is a constant that nothing else reads."""
    weight = conv.inputs[1]
    return graph.is_constant(weight) and len(graph.value(weight).uses()) == 1


def grown_from(start: ir.Node, fits: Callable[[ir.Node], bool]) -> set[ir.Node]:
    """The node, and all others of its graph that fit and are connected with it by such nodes."""
    part, todo = {start}, [start]
    while todo:
        node = todo.pop()
        near = [v.producer() for v in data_of(node)]
        near += [reader for v in node.outputs for reader in graph.consumers(v)]
        for other in near:
            if other is None or other in part or other.graph is not start.graph:
                continue
            if fits(other):
                part.add(other)
                todo.append(other)
    return part


def set_apart(
    inside: ir.Graph,
    part: set[ir.Node],
    enter: Callable[[ir.Value], ir.Node],
    leave: Callable[[ir.Value], ir.Node],
) -> None:
    """Edit in place: the part reads what `enter` makes of the tensors of other nodes, and others
    read what `leave` makes of its own. Each of its nodes has one output.
    """
    nodes = [n for n in inside if n in part]
    for value in dict.fromkeys(v for n in nodes for v in data_of(n) if v.producer() not in part):
        within = [use for use in value.uses() if use.node in part]
        first = next(n for n in nodes if value in n.inputs)
        entered = _named(inside, enter(value), value)
        inside.insert_before(first, entered)
        for use in within:
            use.node.replace_input_with(use.idx, entered.outputs[0])
    for node in nodes:
        value = node.outputs[0]
        outside = [use for use in value.uses() if use.node not in part]
        if outside or value.is_graph_output():
            left = _named(inside, leave(value), value)
            inside.insert_after(node, left)
            for use in outside:
                use.node.replace_input_with(use.idx, left.outputs[0])
            if value.is_graph_output():
                _rename_output(inside, value, left.outputs[0])
        value.shape = None


def _named(inside: ir.Graph, node: ir.Node, value: ir.Value) -> ir.Node:
    """The new node with a name after the value that it reads, and its output of that type."""
    node.name = node.outputs[0].name = free_name(inside, str(value.name))
    node.outputs[0].type = value.type
    return node


def _rename_output(inside: ir.Graph, value: ir.Value, left: ir.Value) -> None:
    """The graph gives `left` under the name that the value had."""
    name, inner = value.name, left.name
    for i, output in enumerate(inside.outputs):
        if output is value:
            inside.outputs[i] = left
    left.type, left.shape = value.type, value.shape
    value.name, left.name = f"{inner}_inner", name

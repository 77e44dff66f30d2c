"""Nodes and initializers that nothing reads leave a model, in branches too."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common as passes

from quant_core.model.graph import graphs_in, graphs_inside, home, nodes_of


def drop_unused(model: ir.Model) -> None:
    """Edit in place: nodes and initializers that nothing reads go, in branches too."""
    _drop_unused_nodes(model)
    for graph in graphs_inside(model.graph):
        for name, value in list(graph.initializers.items()):
            if not value.uses() and not value.is_graph_output():
                del graph.initializers[name]


def _drop_unused_nodes(model: ir.Model) -> None:
    """Edit in place: a node that goes stops reading, and so do the nodes of its branches.

    onnx_ir's pass alone would keep all that those of a branch read, and drop outputs that a kernel
    has to write.
    """
    needed = [(home(node), value) for node in nodes_of(model) for value in _presents(node)]
    for inside, value in needed:
        inside.outputs.append(value)
    gone: list[ir.Node] | None = None
    while gone is None or gone:
        around = [n for n in nodes_of(model) if graphs_in(n)]
        passes.RemoveUnusedNodesPass()(model)
        gone = [node for node in around if node.graph is None]
        for node in gone:
            unread_branches(node)
    for inside, value in needed:
        inside.outputs.remove(value)


def _presents(node: ir.Node) -> list[ir.Value]:
    """The unread outputs without which onnxruntime's kernel does not run: Attention that reads a
    past writes the present. None of a node of which nothing else is read.
    """
    if node.op_type != "Attention" or node.domain or not _is_read(node.outputs[0]):
        return []
    pairs = zip(node.inputs[4:6], node.outputs[1:3], strict=False)
    return [new for past, new in pairs if past is not None and new.name and not _is_read(new)]


def _is_read(value: ir.Value) -> bool:
    return bool(value.uses()) or value.is_graph_output()


def unread_branches(node: ir.Node) -> None:
    """Edit in place: the nodes in the branches of a node that goes stop reading."""
    for inside in graphs_in(node):
        for inner in inside.all_nodes():
            for position in range(len(inner.inputs)):
                inner.replace_input_with(position, None)

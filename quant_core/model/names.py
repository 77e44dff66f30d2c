"""One name, one value: graphs inside others get no name that another graph has."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir


def make_unique(model: ir.Model) -> dict[str, str]:
    """Edit in place: values of an inner graph whose name another graph has get a number behind it.

    Plans, statistics and caches know a value by its name, and ONNX allows sibling graphs to use the
    same ones. Nobody outside sees the names of inner graphs, whose inputs and outputs are told
    apart by position. The main graph keeps its names.

    Returns the former name of each value that was renamed, by its new name.
    """
    taken = {str(v.name) for v in _values(model.graph) if v.name}
    former = {}
    for inside in model.graph.subgraphs():
        for value in _values(inside):
            if not value.name:
                continue
            name, n = value.name, 1
            while name in taken:
                name, n = f"{value.name}_{n}", n + 1
            if name != value.name:
                former[name] = value.name
                value.name = name
            taken.add(name)
    return former


def _values(inside: ir.Graph) -> Iterator[ir.Value]:
    """The values that a graph defines, each once."""
    yield from inside.inputs
    yield from [v for v in inside.initializers.values() if not v.is_graph_input()]
    for node in inside:
        yield from node.outputs

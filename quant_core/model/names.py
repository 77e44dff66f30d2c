"""One name, one value: across the graphs of a model, and each time that it is optimized again."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import onnx_ir as ir

from quant_core.model import graph


def make_unique(model: ir.Model) -> dict[str, str]:
    """Edit in place: values of an inner graph whose name another graph has get a number behind it.

    Plans, statistics and caches know a value by its name, and ONNX allows sibling graphs to use the
    same ones. Nobody outside sees the names of inner graphs, whose inputs and outputs are told
    apart by position; but onnxruntime's own operators, such as BeamSearch, know them by name. The
    main graph keeps its names.

    Returns the former name of each value that was renamed, by its new name.
    """
    taken = {str(v.name) for v in _values(model.graph) if v.name}
    kept = {
        value
        for node in model.graph.all_nodes()
        if node.domain == graph.MICROSOFT
        for inside in graph.graphs_in(node)
        for value in (*inside.inputs, *inside.outputs)
    }
    former = {}
    for inside in graph.graphs_inside(model.graph):
        for value in _values(inside):
            if not value.name or value in kept:
                continue
            name = free(value.name, taken)
            if name != value.name:
                former[name] = value.name
                value.name = name
            taken.add(name)
    return former


def rename_folded(folded: ir.Model, source: ir.Model) -> None:
    """Edit in place: values that are not of the source get names that onnxruntime does not give.

    Its optimizer numbers what it makes, such as the shapes around a Gemm that was a MatMul and an
    Add. Where it makes more of them when it loads a model that it has written, the numbers meet:
    "Attempt to replace the existing tensor".
    """
    known = {v.name for inside in graph.graphs_of(source) for v in _values(inside)}
    taken = known | {v.name for inside in graph.graphs_of(folded) for v in _values(inside)}
    for inside in graph.graphs_of(folded):
        for value in _values(inside):
            if value.name and value.name not in known:
                value.name = free(f"folded/{value.name}", taken)
                taken.add(value.name)


def free(name: str, taken: Collection[str | None]) -> str:
    """The name, with a number behind it where it is taken."""
    found, n = name, 1
    while found in taken:
        found, n = f"{name}_{n}", n + 1
    return found


def _values(inside: ir.Graph) -> Iterator[ir.Value]:
    """The values that a graph defines, each once."""
    yield from inside.inputs
    yield from [v for v in inside.initializers.values() if not v.is_graph_input()]
    for node in inside:
        yield from node.outputs

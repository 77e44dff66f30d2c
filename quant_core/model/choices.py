"""The choice among results that a model may end in, and what it chooses from.

    boxes, scores ──> TopK or NonMaxSuppression ──> Gather ──> outputs

Where results are close to one another, the smallest noise changes which of them come first, and in
which order: an output then has other boxes in its rows, whatever became of the weights.
"""

from __future__ import annotations

import math

import onnx_ir as ir

from quant_core.model import graph
from quant_core.model.subgraph import reads

CHOOSES = frozenset({"NonMaxSuppression", "TopK"})
LEAST_SHARE = 0.01  # of all weights: of fewer it does not matter in how many bits they are


def chosen_from(model: ir.Model) -> list[str]:
    """The results that a model chooses among at its end; empty if it does not end so, because
    weights are behind the choice, as those of a mixture of experts are.
    """
    ending = behind_choices(model)
    own, elements = _weights_of(ending | inside_of(ending)), _weights_of({*graph.nodes_of(model)})
    ends_so = own < LEAST_SHARE * elements
    return [str(v.name) for v in read_by(ending)] if ends_so else []


def behind_choices(model: ir.Model) -> set[ir.Node]:
    """The nodes that choose among results, all behind them, and what only these read of constants;
    empty if floats end in none.
    """
    behind, constant = set[ir.Node](), set[ir.Node]()
    for node in model.graph:
        if node.op_type in CHOOSES or any(v.producer() in behind for v in reads(node)):
            behind.add(node)
        elif all(v.producer() in constant or graph.is_constant(v) for v in reads(node)):
            constant.add(node)
    inside = inside_of(behind)
    for node in reversed(model.graph):
        readers = {reader for v in node.outputs for reader in graph.consumers(v)}
        is_given = any(v.is_graph_output() for v in node.outputs)
        if node in constant and readers and readers <= behind | inside and not is_given:
            behind.add(node)
    lost = [v for v in model.graph.outputs if v.producer() in behind]
    ends_in_floats = not all(_is_integer(v) for v in lost) and read_by(behind)
    return behind if ends_in_floats else set()


def inside_of(nodes: set[ir.Node]) -> set[ir.Node]:
    """The nodes of the graphs that these nodes hold."""
    return {n for node in nodes for held in graph.graphs_in(node) for n in held.all_nodes()}


def read_by(behind: set[ir.Node]) -> list[ir.Value]:
    """The results that these nodes read of others, each once, in order."""
    read = dict.fromkeys(v for node in behind for v in reads(node))
    own = [v for v in read if v.producer() is not None and v.producer() not in behind]
    return sorted((v for v in own if not _is_integer(v)), key=lambda v: str(v.name))


def _weights_of(nodes: set[ir.Node]) -> int:
    """How many numbers the float weights have that these nodes read."""
    weights = {v for node in nodes for v in node.inputs if graph.is_float_weight(v)}
    return sum(math.prod(graph.shape_of(v)) for v in weights if v is not None)


def _is_integer(value: ir.Value) -> bool:
    """Whether it is known to hold no floats."""
    return value.dtype is not None and not value.dtype.is_floating_point()

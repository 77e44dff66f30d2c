"""Bounds of a tensor in a row become one Relu or Clip."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from quant_core.model import graph
from quant_core.optimize.applied import Applied
from quant_core.optimize.edit import constant, put_in_place
from quant_core.optimize.facts import Facts

Bounds = tuple[float, float]

NO_BOUNDS: Bounds = (-math.inf, math.inf)
AT_ZERO: Bounds = (0.0, math.inf)


def one_clip(model: ir.Model, facts: Facts) -> list[Applied]:
    """A row of Relu, Clip, Max and Min, as some exporters write ReLU6.

        Max(x, 0) -> Min(6)   =>   Clip(x, 0, 6)
        Max(x, 0)             =>   Relu(x)

    1. A Clip has constant bounds; a Max or Min has one constant number, which does not widen the
       other operand.
    2. Each is read by the next alone.
    3. A Relu or Clip alone stays as it is.

    onnxruntime merges Relu and Clip into the Conv before them, and knows them in its blocked
    layout; of Max and Min it knows neither.
    """
    applied = []
    for node in graph.nodes_of(model):
        row = _row_from(node, facts)
        if len(row) > 1 or (row and row[0].op_type in ("Max", "Min")):  # 3.
            applied.append(_merge(graph.home(node), row, facts))
    return applied


def bounds_of(node: ir.Node, facts: Facts) -> tuple[ir.Value, Bounds] | None:
    """What the node reads and the bounds that it keeps, None if it does something else."""
    if node.domain or not node.inputs or node.inputs[0] is None:
        return None
    if node.op_type == "Relu":
        return node.inputs[0], AT_ZERO
    if node.op_type == "Clip":
        bounds = graph.clip_bounds(node)
        return None if bounds is None else (node.inputs[0], (min(bounds), bounds[1]))
    if node.op_type in ("Max", "Min") and len(node.inputs) == 2:
        return _bound_of_extremum(node, facts)
    return None


def _bound_of_extremum(node: ir.Node, facts: Facts) -> tuple[ir.Value, Bounds] | None:
    """What a Max or Min reads beside its constant number, and the bound that this is (1.)."""
    left, right = (graph.value(v) for v in node.inputs)
    x, bound = (right, left) if graph.is_constant(left) else (left, right)
    limit = graph.number(bound)
    if limit is None or graph.is_constant(x):
        return None
    rank, rank_of_bound = facts.rank(x), len(graph.shape_of(bound))
    if rank_of_bound and (rank is None or rank < rank_of_bound):
        return None
    return x, ((limit, math.inf) if node.op_type == "Max" else (-math.inf, limit))


def _row_from(first: ir.Node, facts: Facts) -> list[ir.Node]:
    """The bounds in a row of which this is the first."""
    found = bounds_of(first, facts)
    if found is None:
        return []
    before = found[0].producer()
    if before is not None and bounds_of(before, facts) and graph.only_reader(found[0]) is first:
        return []
    row = [first]
    while (reader := graph.only_reader(row[-1].outputs[0])) is not None:  # 2.
        found = bounds_of(reader, facts)
        if found is None or found[0] is not row[-1].outputs[0]:
            break
        row.append(reader)
    return row


def _merge(inside: ir.Graph, row: list[ir.Node], facts: Facts) -> Applied:
    read = [bounds_of(node, facts) for node in row]
    lo, hi = NO_BOUNDS
    for found in read:
        assert found is not None
        low, high = found[1]
        lo, hi = min(max(lo, low), high), min(max(hi, low), high)
    source, last = read[0][0] if read[0] else None, row[-1]
    name = str(last.name)
    if (lo, hi) == AT_ZERO:
        node = ir.Node("", "Relu", [source], name=name)
    else:
        ends = [
            None if math.isinf(n) else constant(inside, f"{name}_bound", np.array(n))
            for n in (lo, hi)
        ]
        node = ir.Node("", "Clip", [source, *ends], name=name)
    put_in_place(row, node)
    return Applied("one_clip", name, tuple(str(n.name) for n in row[:-1]))

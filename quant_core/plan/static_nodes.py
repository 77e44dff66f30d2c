"""Which nodes read and write 8-bit tensors, and which tensors get the Q/DQ pairs for it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import onnx_ir as ir

from quant_core.config import QuantConfig
from quant_core.model import graph
from quant_core.model.origins import matches
from quant_core.plan.operators import CAPS, RULES, Kind, rule_of, why_not_integer
from quant_core.plan.targets import Target
from quant_core.plan.types import Compute, NodeChoice
from quant_core.plan.weighted_nodes import NO_CHOICE

BIAS_BYTES = 8  # of one channel's bias: int32 and its scale
# Of the bytes of a weight in int8: copies of its bias that take more are worth a common range. Not
# tuned: the steps of an unrolled loop are far above it, heads of a detector far below.
LARGE_BIASES = 0.125


def static_nodes(
    nodes: list[ir.Node],
    anchors: set[str],
    config: QuantConfig,
    choices: Mapping[str, NodeChoice],
    known_as: Mapping[str, Sequence[str]],
    target: Target,
) -> set[str]:
    """The nodes that read and write 8-bit tensors.

    1. Anchors that compute static do.
    2. Start with every elementwise and moving operator as well. Drop one if an input is not 8-bit
       anyway (written by a static node that requantizes, or read by a static anchor), or if nobody
       static reads its output. Repeat.
    """
    movers = {str(n.name) for n in nodes if _may_move(n, config, choices, known_as)}
    by_name = {str(n.name): n for n in nodes}
    while True:
        static = anchors | movers
        live = [by_name[name] for name in by_name if name in static]
        written = {
            capped_output(n)
            for n in live
            if RULES[n.op_type].kind is not Kind.ANCHOR or _needs_q(n, target)
        }
        read_by_anchor = {v for n in live if n.name in anchors for v in data_inputs(n)}
        read = {v for n in live for v in data_inputs(n)}
        is_8_bit = written | read_by_anchor
        kept = {
            str(n.name)
            for n in live
            if n.name in movers and capped_output(n) in read and _all_in(data_inputs(n), is_8_bit)
        }
        if kept == movers:
            return static
        movers = kept


def data_inputs(node: ir.Node) -> list[ir.Value]:
    """The inputs of a node that carry activations and are not constants."""
    positions = RULES[node.op_type].data
    values = [graph.input_at(node, i) for i in positions] if positions else node.inputs
    return [v for v in values if v is not None and not graph.is_constant(v)]


def capped_output(node: ir.Node) -> ir.Value:
    """The output of the node or, where a Relu or Clip(0, ...) alone reads it, of that: what will be
    quantized.
    """
    out = node.outputs[0]
    readers = graph.consumers(out)
    if RULES[node.op_type].kind is Kind.MOVES:
        return out  # it has the parameters of its input, which no cap made
    alone = len(readers) == 1 and not out.is_graph_output() and readers[0].graph is node.graph
    if alone and _caps_at_zero(readers[0]):
        return readers[0].outputs[0]
    return out


def _caps_at_zero(node: ir.Node) -> bool:
    if node.op_type not in CAPS:
        return False
    bounds = (0.0, math.inf) if node.op_type == "Relu" else graph.clip_bounds(node)
    return bounds is not None and bounds[0] == 0


def _may_move(
    node: ir.Node,
    config: QuantConfig,
    choices: Mapping[str, NodeChoice],
    known_as: Mapping[str, Sequence[str]],
) -> bool:
    """Whether an operator without weights could run on 8-bit data, and nobody forbids it."""
    if rule_of(node) is None or why_not_integer(node):
        return False
    name = str(node.name)
    return (
        RULES[node.op_type].kind in (Kind.ELEMENTWISE, Kind.MOVES)
        and choices.get(name, NO_CHOICE).compute is not Compute.FLOAT
        and not any(matches(glob, name, *known_as.get(name, ())) for glob in config.exclude)
    )


def _all_in(values: list[ir.Value], found: set[ir.Value]) -> bool:
    """Whether there are values, and all are found."""
    return bool(values) and all(v in found for v in values)


def _needs_q(node: ir.Node, target: Target) -> bool:
    """Whether an integer kernel of the node always writes integers."""
    return RULES[node.op_type].needs_q or target.requantizes_all


def activations(nodes: list[ir.Node], static: set[str], target: Target) -> dict[str, str]:
    """Tensor that gets a Q/DQ pair -> tensor whose parameters it has, in graph order."""
    found: dict[str, str] = {}
    for node in nodes:
        if node.name not in static:
            continue
        rule = RULES[node.op_type]
        for value in data_inputs(node):
            found.setdefault(str(value.name), str(value.name))
        out = str(capped_output(node).name)
        if rule.kind is Kind.MOVES:
            found[out] = found[str(data_inputs(node)[0].name)]
        elif target.requantizes and _needs_q(node, target):
            found.setdefault(out, out)
    return _with_shared_steps(found, [n for n in nodes if n.name in static])


def _with_shared_steps(found: Mapping[str, str], static: Iterable[ir.Node]) -> dict[str, str]:
    """These tensors, with one range for all inputs of nodes that share weight and bias, as the
    steps of an unrolled loop do.

    A bias in int32 lies on the grid of its node's products: with a range for each step, each would
    store one of its own. Where these are small beside the weight, ranges stay apart.
    """
    shared: dict[tuple[ir.Value, ir.Value], list[str]] = {}
    for node in static:
        bias = graph.input_at(node, RULES[node.op_type].bias)
        if bias is not None and graph.is_constant(bias):
            key = graph.value(node.inputs[1]), bias
            shared.setdefault(key, []).append(graph.name_of(node.inputs[0]))
    roots = dict(found)
    for (weight, bias), tensors in shared.items():
        apart = list(dict.fromkeys(roots[tensor] for tensor in tensors))
        stored = BIAS_BYTES * graph.array(bias).size * (len(apart) - 1)
        if stored > LARGE_BIASES * math.prod(graph.shape_of(weight)):
            roots = {t: apart[0] if root in apart else root for t, root in roots.items()}
    return roots

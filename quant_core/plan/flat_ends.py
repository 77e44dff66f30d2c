"""Where the values of a tensor cease to matter: what reads it is flat beyond these ends.

A hard swish is 0 for all values below -3. Integers that reach down to -14 spend half their levels
on what it cannot tell apart.
"""

from __future__ import annotations

import math

import onnx_ir as ir

from quant_core.model import graph

Ends = tuple[float, float]

EVERYWHERE: Ends = (-math.inf, math.inf)


def flat_ends(value: ir.Value) -> Ends:
    """The ends (lo <= 0, hi >= 0) beyond which each reader of the value gives the same as at them;
    infinite where one does not, or where the value is an output of the model.
    """
    readers = graph.consumers(value)
    if not readers or value.is_graph_output():
        return EVERYWHERE
    ends = [_ends_of(node, value) for node in readers]
    return min(0.0, *(lo for lo, _ in ends)), max(0.0, *(hi for _, hi in ends))


def _ends_of(node: ir.Node, value: ir.Value) -> Ends:
    match node.op_type:
        case "Relu":
            return 0.0, math.inf
        case "HardSwish":
            return -3.0, math.inf
        case "HardSigmoid":
            return _of_hard_sigmoid(node)
        case "Clip" if node.inputs[0] is value:
            return graph.clip_bounds(node) or EVERYWHERE
        case "Mul":
            return _of_hard_swish(node, value)
    return EVERYWHERE


def _of_hard_sigmoid(node: ir.Node) -> Ends:
    """The ends of max(0, min(1, alpha * x + beta))."""
    alpha = graph.attribute(node, "alpha", 0.2)
    beta = graph.attribute(node, "beta", 0.5)
    return (-beta / alpha, (1 - beta) / alpha) if alpha > 0 else EVERYWHERE


def _of_hard_swish(node: ir.Node, value: ir.Value) -> Ends:
    """The ends of x * HardSigmoid(x), which is 0 where the factor is."""
    factors = [factor for factor in node.inputs if factor is not value]
    factor = factors[0].producer() if len(factors) == 1 and factors[0] is not None else None
    if factor is None or factor.op_type != "HardSigmoid" or factor.inputs[0] is not value:
        return EVERYWHERE
    return _of_hard_sigmoid(factor)[0], math.inf

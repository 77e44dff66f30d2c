"""How a static node is written: an int8 weight behind a DequantizeLinear, and a bias on the grid of
its products.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quant_core.model import graph
from quant_core.numerics.layout import Layout
from quant_core.plan.operators import RULES, weight_layout
from quant_core.plan.types import Compute, NodePlan, QuantPlan
from quant_core.rewrite import emit
from quant_core.rewrite.bias_correction import bias_of, flat_bias
from quant_core.rewrite.draft import Draft

# Channels, for which the four more nodes of `write_bias` take fewer bytes than it saves.
SHORT_BIAS = 64
# A bias is at most this in int32: `write_bias` rounds to steps of up to 2**16.
INT32_MAX = 2**31 - 2**17
BIAS_MAX = 2**30  # half of what int32 holds: the sum of products is added to the bias


def nodes_alike(plan: QuantPlan, nodes: Mapping[str, ir.Node]) -> dict[ir.Node, list[ir.Node]]:
    """Static node -> the nodes that share its weight and its axis, its bias and the range of its
    input.

    They share what they write for the bias, which gives back what they lose on average. A node
    whose bias is computed or absent is not there.

    nodes  name -> node of the model before it is rewritten
    """
    found: dict[tuple[ir.Value, Layout, ir.Value, str], list[ir.Node]] = {}
    for planned in plan.nodes:
        node = nodes[planned.node]
        if planned.compute is not Compute.STATIC or not planned.is_rounded:
            continue
        bias = bias_of(node)
        if bias is not None and graph.is_constant(bias):
            root = plan.activations[graph.name_of(node.inputs[0])]
            weight = graph.value(node.inputs[1])
            key = weight, weight_layout(node, weight), bias, root
            found.setdefault(key, []).append(node)
    return {node: alike for alike in found.values() for node in alike}


def write_static(
    draft: Draft, node: ir.Node, planned: NodePlan, alike: Sequence[ir.Node]
) -> ir.Node:
    """Rules 2 and 3 of `apply_plan` for a static node; returns the node.

    alike  the nodes that share what is written for its bias, itself among them
    """
    weight = graph.value(node.inputs[1])
    layout = weight_layout(node, weight)
    root = draft.plan.activations[graph.name_of(node.inputs[0])]
    x_scale = float(draft.params[root].scale)
    bias = flat_bias(bias_of(node), graph.shape_of(weight)[layout.channel_axis])
    floor = np.abs(bias) / (BIAS_MAX * x_scale) if bias is not None else 0.0
    rounded = draft.rounding.integers(node, weight, planned, floor=floor)
    draft.written.integers.setdefault(weight, rounded)
    known = draft.written.static
    if rounded.integers not in known:
        write = draft.writer.first(draft.model.graph)
        name = str(weight.name)
        known[rounded.integers] = emit.write_dequantized(write, name, rounded, layout.channel_axis)
    w = known[rounded.integers]
    biases = draft.written.biases
    if alike[0] not in biases:
        found = [draft.rounding.corrected_bias(n, weight, rounded) for n in alike]
        corrected = [bias for bias in found if bias is not None]
        if corrected:
            mean = np.mean(corrected, axis=0)
            biases[alike[0]] = _write_bias(draft, node, mean, x_scale, rounded.integers.scale, w)
    position = RULES[node.op_type].bias
    if position is not None and alike[0] in biases:
        graph.set_input(node, position, biases[alike[0]])
    node.replace_input_with(1, w)
    return node


def _write_bias(
    draft: Draft,
    node: ir.Node,
    bias: NDArray[np.float64],
    x_scale: float,
    w_scale: NDArray[np.float32],
    w: ir.Value,
) -> ir.Value:
    """The bias (C,) in int32 with the scale of the products, or in int16 where constants are folded
    anyway; in float32 where the target wants that.

    w_scale  (C,) or () of the weight
    w        the weight, as its DequantizeLinear gives it
    """
    old = bias_of(node)
    name = f"{node.name}_bias" if old is None else str(old.name)
    scale = (x_scale * w_scale.astype(np.float64)).astype(np.float32)
    steps = np.rint(bias / scale.astype(np.float64))
    q = np.clip(steps, -INT32_MAX, INT32_MAX).astype(np.int32)
    on_grid = np.asarray(q * scale.astype(np.float64), np.float64)
    axis = 0 if scale.ndim else None
    write = draft.writer.before(node)
    counts_on_folding = bool(draft.plan.in_four_bits) and draft.target.decodes_int4
    if not draft.target.integer_bias:
        return write.constant(name, on_grid.astype(np.float32))
    if counts_on_folding and len(q) >= SHORT_BIAS:
        return emit.write_bias(write, name, on_grid, x_scale, w, axis)
    return emit.write_int32(write, name, q, scale, axis)

"""Nodes that quantize their input at run time, or keep their weight in 4 bits: what each needs, and
what nodes share. emit_dynamic.py writes the patterns.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quant_core.calibrate.outliers import treatment_factors, weights_reading
from quant_core.errors import ModelError
from quant_core.model import graph
from quant_core.numerics.layout import Layout
from quant_core.plan.convolutions import is_pointwise
from quant_core.plan.operators import (
    RULES,
    DynamicPattern,
    is_dynamic_product,
    mean_axis,
    weight_layout,
)
from quant_core.plan.types import NodePlan
from quant_core.rewrite import emit_dynamic
from quant_core.rewrite.draft import Draft
from quant_core.rewrite.weight_cache import Rounded


def write_dynamic(draft: Draft, node: ir.Node, planned: NodePlan) -> ir.Node:
    """Rule 4 of `apply_plan`; returns the node that computes in its place.

    Raises: ModelError if the plan treats outliers of an input that the statistics lack.
    """
    if RULES[node.op_type].dynamic_pattern is DynamicPattern.LSTM:
        return _lstm(draft, node, planned)
    if is_pointwise(node):
        return _pointwise(draft, node, planned)
    return _matmul(draft, node, planned)


def write_blocks(draft: Draft, node: ir.Node, planned: NodePlan) -> ir.Node:
    """Rules 2 and 3 of `apply_plan` for a node whose weight stays in 4 bits, in an operator of
    onnxruntime's own; returns that node.
    """
    weight = graph.value(node.inputs[1])
    rounded = draft.rounding.integers(node, weight, planned)
    bias = draft.rounding.corrected_bias(node, weight, rounded)
    known = draft.written.blocks
    if rounded.integers not in known:
        write = draft.writer.first(draft.model.graph)
        known[rounded.integers] = emit_dynamic.write_block_weight(write, str(weight.name), rounded)
    write = draft.writer.before(node)
    return emit_dynamic.write_blocks(write, node, rounded, known[rounded.integers], bias)


def _matmul(draft: Draft, node: ir.Node, planned: NodePlan) -> ir.Node:
    """A product of integers; its input is quantized at run time once for all nodes that read it."""
    x, weight = graph.value(node.inputs[0]), graph.value(node.inputs[1])
    rounded, factors = _rounded(draft, node, planned)
    integers, written = rounded.integers, draft.written
    has_own_rows = rounded.layout == weight_layout(node, weight)
    layout = Layout((1, 0)) if has_own_rows else Layout((0, 1))
    key = integers, layout
    if key not in written.products:
        first = draft.writer.first(draft.model.graph)
        written.products[key] = emit_dynamic.write_weight(first, str(weight.name), integers, layout)
    write = draft.writer.before(node)
    read = x, graph.home(node)
    if read not in written.inputs:
        written.inputs[read] = emit_dynamic.write_input(write, x, factors)
    quantized = written.inputs[read]
    return emit_dynamic.write_matmul(write, node, quantized, written.products[key], factors)


def _pointwise(draft: Draft, node: ir.Node, planned: NodePlan) -> ir.Node:
    """A product of integers along the channels of a Conv, which are last there; all such Convs that
    read one tensor share what quantizes it.
    """
    x, weight = graph.value(node.inputs[0]), graph.value(node.inputs[1])
    rounded, factors = _rounded(draft, node, planned)
    bias = draft.rounding.corrected_bias(node, weight, rounded, factors)
    key, written = (rounded.integers, rounded.layout), draft.written
    if key not in written.products:
        first = draft.writer.first(draft.model.graph)
        written.products[key] = emit_dynamic.write_pixel_weight(first, str(weight.name), rounded)
    write = draft.writer.before(node)
    rank = len(rounded.shape)
    if x not in written.pixels:
        pixels = write.node("Transpose", [x], f"{x.name}_pixels", perm=(0, *range(2, rank), 1))
        written.pixels[x] = emit_dynamic.write_input(write, pixels, factors)
    return emit_dynamic.write_pointwise(
        write, node, rank, written.pixels[x], written.products[key], bias, factors
    )


def _lstm(draft: Draft, node: ir.Node, planned: NodePlan) -> ir.Node:
    w, r = (graph.value(node.inputs[i]) for i in RULES[node.op_type].weights)
    rounded_w = draft.rounding.integers(node, w, planned)
    rounded_r = draft.rounding.integers(node, r, planned)
    draft.written.integers.setdefault(w, rounded_w)
    draft.written.integers.setdefault(r, rounded_r)
    return emit_dynamic.write_lstm(draft.writer.before(node), node, rounded_w, rounded_r)


def _rounded(
    draft: Draft, node: ir.Node, planned: NodePlan
) -> tuple[Rounded, NDArray[np.float32] | None]:
    """The integers of the node's weight, and the factors (K,) that it was multiplied by first, None
    if the plan does not treat outliers of its input.
    """
    weight, factors = graph.value(node.inputs[1]), _factors(draft, node)
    rounded = draft.rounding.integers(node, weight, planned, factors=factors)
    if factors is None:
        draft.written.integers.setdefault(weight, rounded)
    return rounded, factors


def _factors(draft: Draft, node: ir.Node) -> NDArray[np.float32] | None:
    """(K,) by which all dynamic nodes that read what this one reads divide it; None if the plan
    does not treat it.
    """
    x, axis = graph.value(node.inputs[0]), mean_axis(node)
    tensor = str(x.name)
    treatment = draft.plan.outliers.get(tensor)
    if treatment is None:
        return None
    known = draft.written.factors
    if x not in known:
        moments = None
        if draft.stats is not None and axis is not None:
            moments = draft.stats.means.get((tensor, axis))
        if moments is None:
            raise ModelError("treating outliers needs calibration", tensor, "Give calibration data")
        readers = [n.node for n in draft.plan.nodes if is_dynamic_product(n)]
        weights = weights_reading(draft.model, tensor, readers)
        known[x] = treatment_factors(treatment, moments.max_abs, weights.values())
    return known[x]

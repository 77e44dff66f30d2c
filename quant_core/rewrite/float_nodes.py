"""How the weights of float operators are written: stored in fewer bits, read as float32."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from quant_core.model import graph
from quant_core.model.unused import drop_unused
from quant_core.numerics.float16 import FLOAT16
from quant_core.plan.operators import RULES, weight_layout, weight_positions
from quant_core.plan.types import NodePlan
from quant_core.plan.weighted_nodes import is_folded
from quant_core.rewrite import emit, emit_tables
from quant_core.rewrite.draft import Draft, FloatKey
from quant_core.rewrite.rounding import bias_of
from quant_core.rewrite.weight_cache import Rounded
from quant_core.rewrite.writer import Cursor


def write_weight_only(draft: Draft, node: ir.Node, planned: NodePlan) -> ir.Node:
    """Rules 2 and 3 of `apply_plan`: each weight is float again when onnxruntime has loaded the
    model, or behind the standard DequantizeLinear; returns the node.
    """
    write = _folded if is_folded(draft.plan.config, draft.target) else _standard
    for position in weight_positions(node):
        if graph.is_float_weight(graph.input_at(node, position)):
            write(draft, node, planned, position)
    return node


def write_float16(draft: Draft, node: ir.Node) -> ir.Node:
    """Weights as float16 in the file, float32 when onnxruntime has loaded it; rows of a table when
    they are picked. Returns the node.
    """
    rule = RULES[node.op_type]
    for position in weight_positions(node):
        weight = graph.input_at(node, position)
        if weight is None or not graph.is_float_weight(weight):
            continue
        value = _float16(draft, weight)
        if rule.is_table:
            rows = emit_tables.write_half_rows(draft.writer.before(node), value, node)
            graph.replace_value(node.outputs[0], rows)
        else:
            node.replace_input_with(position, value)
    return node


def write_other_readers(draft: Draft) -> None:
    """Rule 5 of `apply_plan`."""
    for weight, rounded in draft.written.integers.items():
        if weight.uses() and not weight.is_graph_output():
            write = draft.writer.first(graph.home(weight))
            weight.replace_all_uses_with(emit.write_folded(write, str(weight.name), rounded))
    for (weight, _), value in draft.written.standard.items():
        if weight.uses() and not weight.is_graph_output():
            weight.replace_all_uses_with(value)
    for weight, value in draft.written.float16.items():
        if not weight.is_graph_output():
            weight.replace_all_uses_with(value)


def write_float16_constants(draft: Draft) -> None:
    """Rule 6 of `apply_plan`."""
    constants = graph.initializers_of(draft.model)
    stored = [v for v in constants if draft.plan.constants.get(str(v.name)) == FLOAT16]
    for value in stored:
        for use in list(value.uses()):
            use.node.replace_input_with(use.idx, _float16(draft, value))
    if stored:
        drop_unused(draft.model)


def _standard(draft: Draft, node: ir.Node, planned: NodePlan, position: int) -> None:
    """The weight at this input behind the standard DequantizeLinear.

    1. Operators of several layouts read one value.
    2. Integers that a table or an integer operator reads already are not stored again, whichever
       nodes turn them into floats.
    """
    weight = graph.value(node.inputs[position])
    key, known = (weight, planned.weight_storage), draft.written.standard
    if key not in known:  # 1
        write, rounded = draft.writer.first(graph.home(weight)), draft.written.integers.get(weight)
        if rounded is None or rounded.bits < planned.weight_storage.bits:
            known[key] = _write_standard(draft, write, node, planned, weight)
        else:
            known[key] = _write_known(write, str(weight.name), rounded)  # 2
    node.replace_input_with(position, known[key])


def _write_known(write: Cursor, name: str, rounded: Rounded) -> ir.Value:
    """Integers that are stored, behind DequantizeLinear if it takes them: with a scale for each
    index of an axis, or one for all.
    """
    layout = rounded.layout
    if layout.has_one_channel_axis(rounded.shape) or not rounded.integers.scale.ndim:
        return emit.write_dequantized(write, name, rounded, layout.channel_axis)
    return emit.write_folded(write, name, rounded)


def _write_standard(
    draft: Draft, write: Cursor, node: ir.Node, planned: NodePlan, weight: ir.Value
) -> ir.Value:
    """The weight, rounded for this node."""
    found, name = draft.rounding.standard(node, weight, planned), str(weight.name)
    value = emit.write_qdq(write, name, found.q, found.params)
    if found.rows is None:
        return value
    return emit.write_from_rows(write, name, value, found.rows, graph.shape_of(weight))


def _folded(draft: Draft, node: ir.Node, planned: NodePlan, position: int) -> None:
    """The weight at this input as nodes that onnxruntime folds, and the bias corrected for it."""
    weight = graph.value(node.inputs[position])
    key = FloatKey(weight, planned.weight_storage, weight_layout(node, weight))
    written = draft.written
    rounded = written.integers.get(weight)
    if rounded is None or rounded.bits < planned.weight_storage.bits:
        rounded = draft.rounding.integers(node, weight, planned)
        written.integers[weight] = rounded
    if key not in written.floats:
        write = draft.writer.first(graph.home(weight))
        written.floats[key] = emit.write_folded(write, str(weight.name), rounded)
    at, bias = RULES[node.op_type].bias, None
    if draft.rounding.corrects_bias(node) and rounded.layout == key.layout:
        bias = draft.rounding.corrected_bias(node, weight, rounded)
    if at is not None and bias is not None:
        write, old = draft.writer.first(graph.home(node)), bias_of(node)
        name = f"{node.name}_bias" if old is None else f"{old.name}_corrected"
        graph.set_input(node, at, write.constant(name, bias.astype(np.float32)))
    node.replace_input_with(position, written.floats[key])


def _float16(draft: Draft, value: ir.Value) -> ir.Value:
    """The constant as float16 with the node that casts it back, written once."""
    known = draft.written.float16
    if value not in known:
        write = draft.writer.first(graph.home(value))
        known[value] = emit.write_half(write, str(value.name), graph.array(value))
    return known[value]

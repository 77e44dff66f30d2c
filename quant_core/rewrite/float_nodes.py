"""How the weights of float operators are written: stored in fewer bits, read as float32."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from quant_core.model import graph
from quant_core.model.unused import drop_unused
from quant_core.numerics.float16 import FLOAT16
from quant_core.numerics.granularity import PerTensor
from quant_core.plan.operators import RULES, weight_layout, weight_positions
from quant_core.plan.types import NodePlan, Storage
from quant_core.plan.weight_formats import is_folded
from quant_core.rewrite import emit, emit_tables
from quant_core.rewrite.bias_correction import bias_of
from quant_core.rewrite.draft import Draft, FloatKey
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
    for (weight, _), (value, _) in draft.written.standard.items():
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
    """The weight at this input behind the standard DequantizeLinear, and the bias corrected for it.

    1. Operators of several layouts read one value.
    2. Integers that a table or an integer operator reads already are not stored again, whichever
       nodes turn them into floats.
    3. Those in 8 bits are rounded as an integer operator's would be: a node that moves from
       integers to float loses nothing by it.
    """
    weight = graph.value(node.inputs[position])
    key, known = (weight, planned.weight_storage), draft.written.standard
    if key not in known:  # 1
        known[key] = _write_standard(draft, node, planned, weight)
    value, rounded = known[key]
    if rounded is not None:
        _correct_bias(draft, node, weight, rounded)
    node.replace_input_with(position, value)


def _write_standard(
    draft: Draft, node: ir.Node, planned: NodePlan, weight: ir.Value
) -> tuple[ir.Value, Rounded | None]:
    """The weight of this node by rules 2 and 3 of `_standard`, and its integers if these are what
    integer operators read.
    """
    write, name = draft.writer.first(graph.home(weight)), str(weight.name)
    rounded = draft.written.integers.get(weight)
    is_stored = rounded is not None and rounded.bits >= planned.weight_storage.bits  # 2
    if not is_stored and _is_rounded_as_integers(draft, node, weight, planned):  # 3
        rounded, is_stored = draft.rounding.integers(node, weight, planned), True
    if rounded is not None and is_stored:
        return _write_known(write, name, rounded), rounded
    found = draft.rounding.standard(node, weight, planned)
    value = emit.write_qdq(write, name, found.q, found.params)
    if found.rows is not None:
        value = emit.write_from_rows(write, name, value, found.rows, graph.shape_of(weight))
    return value, None


def _is_rounded_as_integers(
    draft: Draft, node: ir.Node, weight: ir.Value, planned: NodePlan
) -> bool:
    """Whether the weight is what integer operators read: 8 bits with zero point 0, and a scale for
    each index of an axis, or one for all.
    """
    if RULES[node.op_type].is_table or planned.weight_storage is not Storage.INT8:
        return False
    if not draft.plan.config.symmetric:
        return False
    has_one_axis = weight_layout(node, weight).has_one_channel_axis(graph.shape_of(weight))
    return has_one_axis or planned.granularity == PerTensor()


def _write_known(write: Cursor, name: str, rounded: Rounded) -> ir.Value:
    """Integers that are stored, behind DequantizeLinear if it takes them: with a scale for each
    index of an axis, or one for all.
    """
    layout = rounded.layout
    if layout.has_one_channel_axis(rounded.shape) or not rounded.integers.scale.ndim:
        return emit.write_dequantized(write, name, rounded, layout.channel_axis)
    return emit.write_folded(write, name, rounded)


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
    _correct_bias(draft, node, weight, rounded)
    node.replace_input_with(position, written.floats[key])


def _correct_bias(draft: Draft, node: ir.Node, weight: ir.Value, rounded: Rounded) -> None:
    """Gives the node a bias that gives back what rounding the weight took from each channel's mean,
    where calibration knows it.
    """
    at = RULES[node.op_type].bias
    is_its_own = rounded.layout == weight_layout(node, weight)
    if at is None or not is_its_own or not draft.rounding.corrects_bias(node):
        return
    bias = draft.rounding.corrected_bias(node, weight, rounded)
    if bias is not None:
        write, old = draft.writer.first(graph.home(node)), bias_of(node)
        name = f"{node.name}_bias" if old is None else f"{old.name}_corrected"
        graph.set_input(node, at, write.constant(name, bias.astype(np.float32)))


def _float16(draft: Draft, value: ir.Value) -> ir.Value:
    """The constant as float16 with the node that casts it back, written once."""
    known = draft.written.float16
    if value not in known:
        write = draft.writer.first(graph.home(value))
        known[value] = emit.write_half(write, str(value.name), graph.array(value))
    return known[value]

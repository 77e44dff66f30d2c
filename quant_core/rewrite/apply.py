"""How a plan and what calibration measured become a quantized model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from quant_core.calibrate.observe import Statistics
from quant_core.calibrate.ranges import RangeCache
from quant_core.deadline import NO_DEADLINE, Deadline
from quant_core.errors import ModelError
from quant_core.model import files, graph
from quant_core.model.carried import insert_identities
from quant_core.model.normalize import normalize
from quant_core.model.opset import OPSET_INT4, raise_opset
from quant_core.model.qat import respects_pairs
from quant_core.model.unused import drop_unused
from quant_core.model.write import sign
from quant_core.plan.operators import RULES
from quant_core.plan.targets import TARGETS, Target
from quant_core.plan.types import Compute, NodePlan, QuantPlan, Storage
from quant_core.rewrite.activations import activation_params, quantize_activations
from quant_core.rewrite.counted_padding import leave_out_padding
from quant_core.rewrite.dequantize_once import dequantize_once
from quant_core.rewrite.draft import Draft
from quant_core.rewrite.dynamic import write_blocks, write_dynamic
from quant_core.rewrite.float_islands import keep_in_float
from quant_core.rewrite.float_nodes import (
    write_float16,
    write_float16_constants,
    write_other_readers,
    write_weight_only,
)
from quant_core.rewrite.hard_sigmoid import spell_out_hard_sigmoid
from quant_core.rewrite.lower_pairs import lower_pairs
from quant_core.rewrite.parts import cut_parts
from quant_core.rewrite.rounding import Rounding
from quant_core.rewrite.static_nodes import nodes_alike, write_static
from quant_core.rewrite.tables import write_table
from quant_core.rewrite.weight_cache import WeightCache
from quant_core.rewrite.writer import Writer


@dataclass(frozen=True, slots=True, eq=False)
class Quantized:
    """What `apply_plan` makes.

    written         planned node -> the node that computes in its place
    weight_sqnr_db  planned node -> signal to rounding noise of its worst weight in dB
    worst_row_db    planned node -> the same of the worst channel of its weights
    """

    model: ir.Model
    written: Mapping[str, ir.Node]
    weight_sqnr_db: Mapping[str, float]
    worst_row_db: Mapping[str, float]


def apply_plan(
    model: ir.Model,
    plan: QuantPlan,
    stats: Statistics | None,
    *,
    ranges: RangeCache | None = None,
    weights: WeightCache | None = None,
    deadline: Deadline = NO_DEADLINE,
) -> Quantized:
    """The quantized model; `model` is not changed.

    ranges    those that were found before, for other plans
    weights   those that were rounded before, for other plans of one float model with the same
              statistics
    deadline  when rounding should end: the weights after that are rounded to nearest

    1. Every activation of the plan gets one QuantizeLinear and one DequantizeLinear. Where a static
       node writes it, all readers read the rounded tensor (else the node would not fuse);
       otherwise only static readers do (activations.py).
    2. Every planned weight is replaced by its integers and the nodes that bring them back
       (emit.py, tables.py, float_nodes.py).
    3. A bias of a Conv or Gemm gives back what rounding the weight takes from each channel's mean;
       of a static one it becomes int32 with scale x_scale * w_scale (static_nodes.py).
    4. Dynamic MatMul, Gemm, LSTM and 1x1 Conv quantize their input at run time (dynamic.py).
    5. Whatever else reads a weight that is stored as integers or float16 reads what these stand
       for, so that no weight is stored twice.
    6. Constants that are to be float16, and are still read, are.
    7. Float nodes between integers are written so that they stay float (float_islands.py).
    8. Pairs of quantization-aware training keep their scales (lower_pairs.py).
    9. HardSigmoid is written as Clip for a runtime that has no fast kernel of it.
    10. An AveragePool that counts its padding is written as one that does not, for a runtime that
       pads integers wrongly (counted_padding.py).
    11. Float nodes that read one rounded tensor share what dequantizes it (dequantize_once.py).
    12. What is stored as a part of another constant is cut out of that at loading (parts.py).

    Raises: ModelError if the plan names tensors that the statistics or the model lack.
    """
    copy = model.clone()
    target = TARGETS[plan.target]
    if plan.in_four_bits or target.activation_bits > 8:
        copy = raise_opset(copy, OPSET_INT4)
        normalize(copy)
        insert_identities(copy)
    if respects_pairs(copy):
        lower_pairs(copy, target)  # 8
    rounding = Rounding(plan, stats, weights, deadline)
    draft = _draft(copy, plan, stats, RangeCache() if ranges is None else ranges, rounding)
    written = _write_nodes(draft)  # 2, 3, 4
    write_other_readers(draft)  # 5
    static = [draft.nodes[n.node] for n in plan.nodes if n.compute is Compute.STATIC]
    rounded = quantize_activations(draft, static)  # 1
    drop_unused(copy)
    write_float16_constants(draft)  # 6
    keep_in_float(copy, is_onnxruntime=target.is_onnxruntime)  # 7
    spell_out(copy, target)  # 9, 10
    if target.is_onnxruntime:
        dequantize_once(copy, draft.writer, rounded, static)  # 11
        cut_parts(copy, draft.writer)  # 12
    files.release(*files.external_tensors(model))
    sign(copy)
    remaining = {planned: node for planned, node in written.items() if node.graph is not None}
    return Quantized(copy, remaining, draft.rounding.sqnr_db, draft.rounding.worst_row_db)


def spell_out(model: ir.Model, target: Target) -> None:
    """Rules 9 and 10 of `apply_plan`, for a float model as well: edit it in place, so that it has
    only operators that the target's runtime computes right and fast.
    """
    if not target.has_hard_sigmoid:
        spell_out_hard_sigmoid(model)  # 9
    if not target.counts_padding:
        leave_out_padding(model)  # 10


def _draft(
    copy: ir.Model,
    plan: QuantPlan,
    stats: Statistics | None,
    ranges: RangeCache,
    rounding: Rounding,
) -> Draft:
    """The copy before its first edit. Raises: ModelError if the plan is not of this model."""
    nodes = {str(n.name): n for n in graph.nodes_of(copy)}
    missing = [n.node for n in plan.nodes if n.node not in nodes]
    if missing:
        raise ModelError(
            f"the plan names nodes that the model lacks: {', '.join(missing[:3])}",
            hint="Plan it anew",
        )
    params = activation_params(plan, stats, nodes, ranges)
    return Draft(copy, plan, stats, nodes, params, rounding, Writer(copy))


def _write_nodes(draft: Draft) -> dict[str, ir.Node]:
    """Rules 2 to 4 of `apply_plan`: planned node -> the node that computes in its place."""
    alike = nodes_alike(draft.plan, draft.nodes)
    written = {}
    for planned in sorted(draft.plan.nodes, key=_order):
        node = draft.nodes[planned.node]
        read = [v.const_value for v in node.inputs if v is not None]
        written[planned.node] = _write_node(draft, node, planned, alike.get(node, [node]))
        files.release(*read)
    return written


def _order(planned: NodePlan) -> int:
    """Tables first, as others may share them; then what computes in integers, whose weights float
    operators can read too.
    """
    if RULES[planned.op_type].is_table:
        return 0
    return 1 if planned.compute.is_integer else 2


def _write_node(draft: Draft, node: ir.Node, planned: NodePlan, alike: list[ir.Node]) -> ir.Node:
    """Write a node as the plan stores and computes it.

    alike  the nodes that share its bias, if it is static
    """
    if planned.storage is Storage.FLOAT16:
        return write_float16(draft, node)
    if not planned.is_rounded:
        return node
    match planned.compute:
        case Compute.STATIC:
            return write_static(draft, node, planned, alike)
        case Compute.BLOCKS:
            return write_blocks(draft, node, planned)
        case Compute.DYNAMIC:
            return write_dynamic(draft, node, planned)
    if RULES[node.op_type].is_table and draft.target.gathers_integers:
        return write_table(draft, node, planned)
    return write_weight_only(draft, node, planned)

"""How activations are quantized: one Q/DQ pair for each, which its readers share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from quant_core.calibrate.observe import Statistics
from quant_core.calibrate.ranges import RangeCache
from quant_core.errors import ModelError
from quant_core.model import graph
from quant_core.numerics.affine import Grid, QuantParams, choose_params, quantize
from quant_core.plan.flat_ends import EVERYWHERE, Ends, flat_ends
from quant_core.plan.operators import RULES, Kind
from quant_core.plan.static_nodes import capped_output, data_inputs
from quant_core.plan.targets import TARGETS, Target
from quant_core.plan.types import QuantPlan
from quant_core.rewrite import emit
from quant_core.rewrite.draft import Draft
from quant_core.rewrite.writer import Writer


def activation_params(
    plan: QuantPlan, stats: Statistics | None, nodes: Mapping[str, ir.Node], ranges: RangeCache
) -> dict[str, QuantParams]:
    """Tensor whose range others share -> scale and zero point of all of them.

    nodes  name -> node of the model before it is rewritten

    Raises: ModelError if the plan quantizes activations that the statistics lack.
    """
    target = TARGETS[plan.target]
    moves = [n.node for n in plan.nodes if RULES[n.op_type].kind is Kind.MOVES]
    moved = {str(nodes[name].outputs[0].name) for name in moves}
    values = (v for node in nodes.values() for v in (*node.inputs, *node.outputs))
    named = {str(v.name): v for v in values if v is not None}
    quantized = {name: value for name, value in named.items() if name in plan.activations}
    ends = {name: flat_ends(value) for name, value in quantized.items()}
    fixed = {
        plan.activations[name]: target.output_ranges[producer.op_type]
        for name, value in quantized.items()
        if (producer := value.producer()) and producer.op_type in target.output_ranges
    }
    return {
        root: choose_params(*fixed[root], _grid(target))
        if root in fixed
        else _params_of(root, plan, stats, _grid(target), ranges, moved, ends)
        for root in dict.fromkeys(plan.activations.values())
    }


def quantize_activations(draft: Draft, static: Sequence[ir.Node]) -> list[ir.Value]:
    """Rule 1 of `apply_plan`, for the static nodes of the draft; the rounded activations.

    Raises: ModelError if the plan names a tensor that the model lacks.
    """
    model = draft.model
    values = {v.name: v for v in model.graph.inputs}
    values |= {v.name: v for n in model.graph for v in n.outputs}
    readers = set(static)
    writers = {capped_output(n) for n in static}
    rounded = []
    for tensor, root in draft.plan.activations.items():
        if tensor not in values:
            raise ModelError(
                f"the plan names tensor {tensor}, which the model lacks", hint="Plan it anew"
            )
        value = values[tensor]
        params = draft.params[root]
        read_by = None if value in writers else readers
        rounded.append(_quantize(model, draft.writer, value, params, read_by))
    for node in static:
        if RULES[node.op_type].kind is Kind.ELEMENTWISE:
            _quantize_constants(draft.writer, node, _grid(draft.target))
    return rounded


def _grid(target: Target) -> Grid:
    """The integers that activations may take."""
    return Grid(target.activation_bits, target.activation_signed, symmetric=not target.zero_points)


def _params_of(
    tensor: str,
    plan: QuantPlan,
    stats: Statistics | None,
    grid: Grid,
    ranges: RangeCache,
    moved: set[str],
    ends: Mapping[str, Ends],
) -> QuantParams:
    """Scale and zero point of an activation and of those that share its range.

    moved  tensors whose values another tensor of the same range has already
    ends   activation -> the ends beyond which its values do not matter
    """
    if stats is None:
        raise ModelError(
            "static quantization needs calibration",
            tensor,
            "Give calibration data, or mode dynamic",
        )
    found = stats.of_tensor(tensor)
    least, most = ends.get(tensor, EVERYWHERE)
    for other, root in plan.activations.items():
        if root == tensor and other not in moved and other != tensor:
            found = found.merge(stats.of_tensor(other))
            low, high = ends.get(other, EVERYWHERE)
            least, most = min(least, low), max(most, high)
    if not found.counts.size:  # of rows that no sample chooses, as an expert's
        raise ModelError(
            "calibration saw no value of this tensor",
            tensor,
            "Give samples that reach it, or mode auto or dynamic",
        )
    lo, hi = ranges.find(found, grid, plan.config.method, plan.config.percentile)
    return choose_params(max(lo, least), min(hi, most), grid)


def _quantize(
    model: ir.Model,
    writer: Writer,
    value: ir.Value,
    params: QuantParams,
    readers: set[ir.Node] | None,
) -> ir.Value:
    """What a Q/DQ pair makes of the value, read by all (None) or by these readers at their data
    inputs.
    """
    uses = [
        u
        for u in value.uses()
        if readers is None or (u.node in readers and value in data_inputs(u.node))
    ]
    is_output = value.is_graph_output() and readers is None
    producer, name = value.producer(), str(value.name)
    write = writer.detached()
    if is_output:
        value.name = writer.free(f"{name}_float")
    dq = emit.write_pair(write, name, value, params)
    if producer is None:
        model.graph.insert_before(model.graph[0], write.waiting)
    else:
        model.graph.insert_after(producer, write.waiting)
    for use in uses:
        use.node.replace_input_with(use.idx, dq)
    if is_output:
        dq.name, dq.type, dq.shape = name, value.type, value.shape
        outputs = model.graph.outputs
        for position in [i for i, output in enumerate(outputs) if output is value]:
            outputs[position] = dq
    return dq


def _quantize_constants(writer: Writer, node: ir.Node, grid: Grid) -> None:
    """Constant operands of an elementwise operator go onto the grid of activations."""
    for i, operand in enumerate(node.inputs):
        if operand is None or not graph.is_constant(operand):
            continue
        array = graph.array(operand)
        params = choose_params(array.min(initial=0.0), array.max(initial=0.0), grid)
        name, q = str(operand.name), quantize(array, params)
        dq = emit.write_qdq(writer.before(node), name, q, params)
        node.replace_input_with(i, dq)

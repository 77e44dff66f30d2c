"""Which nodes lose by integers on a target whose kernels cannot be timed here."""

from __future__ import annotations

import math

import onnx_ir as ir

from quant_core.model import graph
from quant_core.model.session import Feed, sizes_of
from quant_core.plan.make import with_choice
from quant_core.plan.operators import RULES, Kind, channel_axis
from quant_core.plan.targets import TARGETS, KernelTimes
from quant_core.plan.types import IN_FLOAT, Compute, NodePlan, QuantPlan
from quant_core.search.minimum_cut import NodeCost, cheapest_assignments
from quant_core.search.node_costs import tensor_costs

MS = 1e-6  # a nanosecond
CLEAR_GAIN = 1.1  # speed-ups below are within what the estimate is wrong by


def without_losses(model: ir.Model, plan: QuantPlan, feed: Feed) -> QuantPlan:
    """The plan with those nodes in float that gain nothing clear by integers, conversions included.

    What each takes is estimated by the target's kernel times and by its sizes on the feed; the plan
    of a target without such times stays as it is. Which nodes compute in float is a minimum cut.

    Raises: ModelError if the model does not run on the feed.
    """
    kernels = TARGETS[plan.target].kernels
    integer = {n.node: n for n in plan.nodes if n.compute.is_integer}
    if kernels is None or not integer:
        return plan
    nodes = [n for n in model.graph if n.name in integer]
    read = {str(n.name): graph.name_of(n.inputs[0]) for n in nodes}
    written = {str(n.name): graph.name_of(n.outputs[0]) for n in nodes}
    sizes = sizes_of(model, {*read.values(), *written.values(), *plan.activations}, feed)
    costs = {
        name: _cost(node, integer[name], kernels, sizes[read[name]], sizes[written[name]])
        for node in nodes
        if (name := str(node.name))
    }
    conversions = tensor_costs(model, plan, sizes, MS * CLEAR_GAIN * kernels.conversion)
    in_float = cheapest_assignments(costs, conversions)[0].in_float
    losing = [n.node for n in plan.weighted if n.node in in_float]
    return with_choice(model, plan, losing, IN_FLOAT)


def _cost(
    node: ir.Node, planned: NodePlan, kernels: KernelTimes, read: int, written: int
) -> NodeCost:
    """What the node takes that reads and writes tensors of so many elements.

    Nodes that do not multiply by a weight take as long in either way.
    """
    if RULES[node.op_type].kind is not Kind.ANCHOR:
        return NodeCost(0.0, 0.0, 0.0)
    weight = graph.value(node.inputs[1])
    shape = graph.shape_of(weight)
    channels = shape[channel_axis(node, weight)]
    rows = written / channels
    products = rows * math.prod(shape)
    in_float = kernels.float_product * products + kernels.float_output * written
    in_float += kernels.float_unfolded * products / channels
    in_integers = kernels.integer_product * products + kernels.integer_output * written
    in_integers += kernels.integer_unfolded * products / channels
    if rows == 1:
        in_integers = kernels.one_row * in_float
    if planned.compute is Compute.DYNAMIC:
        in_integers += kernels.conversion * read  # by the node itself
    return NodeCost(MS * CLEAR_GAIN * in_integers, MS * in_float, 0.0)

"""What each MatMul and Gemm costs by itself, in each way that it could compute."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray

from quant_core.calibrate.observe import Statistics
from quant_core.evaluate.timing import measure
from quant_core.evaluate.timing_cache import Cost, TimingCache
from quant_core.model import graph, subgraph
from quant_core.model.normalize import normalize
from quant_core.model.session import open_session, values_of
from quant_core.numerics.granularity import PerTensor
from quant_core.plan.operators import RULES
from quant_core.plan.types import Compute, NodePlan, QuantPlan, Storage
from quant_core.rewrite.apply import apply_plan

SECONDS = 0.01  # a product in one way, and as long in float


def is_product(node: NodePlan) -> bool:
    """Whether it multiplies an input by a weight of its own, in one of several ways."""
    return (
        bool(node.weights) and RULES[node.op_type].kind == "anchor" and RULES[node.op_type].dynamic
    )


def product_costs(
    model: ir.Model, plans: Iterable[QuantPlan], stats: Statistics | None, feed: Mapping[str, NDArray[Any]],
    costs: TimingCache,
) -> dict[str, dict[Compute, Cost]]:  # fmt: skip
    """Node -> how it computes in one of the plans -> what that costs on this feed.

    Each product is cut out and run by itself, once for all that multiply tensors of the same shapes. Raises: ModelError
    if the model does not run on the feed.
    """
    nodes = {n.name: n for n in model.graph}
    ways = {
        (n.node, n.compute): (plan, n)
        for plan in plans
        for n in plan.nodes
        if is_product(n) and n.node in nodes
    }
    inputs = {name: graph.name_of(nodes[name].inputs[0]) for name, _ in ways}
    values = next(values_of(model, inputs.values(), [feed], packed=False))
    found: dict[str, dict[Compute, Cost]] = {}
    for (name, compute), (plan, planned) in ways.items():
        x = {inputs[name]: values[inputs[name]]}
        found.setdefault(name, {})[compute] = _cost(
            model, nodes[name], _alone(plan, planned, *x), stats, x, costs
        )
    return found


def _cost(
    model: ir.Model, node: ir.Node, plan: QuantPlan, stats: Statistics | None, x: Mapping[str, NDArray[Any]],
    costs: TimingCache,
) -> Cost:  # fmt: skip
    planned, ((tensor, array),) = plan.nodes[0], x.items()
    shapes = (
        "x".join(map(str, array.shape)),
        "x".join(map(str, graph.shape_of(graph.value(node.inputs[1])))),
    )
    more = []
    if planned.storage is Storage.INT4:
        more.append(f"block {plan.config.block_size}")
    if plan.config.per_channel and planned.granularity == PerTensor():
        more.append("one scale")
    if any(how.split for how in plan.outliers.values()):
        more.append("split")
    if plan.outliers:
        more.append("smooth")
    what = " ".join(
        [node.op_type, *shapes, planned.compute, planned.storage or "", *more, f"for {plan.target}"]
    )

    def timed() -> Any:
        output = str(node.outputs[0].name)
        alone = ir.from_proto(subgraph.extract(model, [node], {output}, {tensor: array}))
        normalize(alone)
        sessions = open_session(alone), open_session(apply_plan(alone, plan, stats).model)
        return measure(*sessions, x, seconds=SECONDS, clock=time.thread_time)

    return costs.of(what, timed)


def _alone(plan: QuantPlan, node: NodePlan, tensor: str) -> QuantPlan:
    """The plan of this node by itself, which reads that tensor."""
    static = {tensor: plan.activations[tensor]} if node.compute == Compute.STATIC else {}
    is_dynamic = node.compute is Compute.DYNAMIC
    outliers = {t: how for t, how in plan.outliers.items() if t == tensor and is_dynamic}
    return replace(
        plan, nodes=(node,), activations=static, means={}, outliers=outliers, constants={}
    )

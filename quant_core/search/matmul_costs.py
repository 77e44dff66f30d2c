"""What each MatMul and Gemm costs by itself, in each way that it could compute."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray

from quant_core.calibrate.observe import Statistics
from quant_core.evaluate.timing import Timing, measure
from quant_core.evaluate.timing_cache import Cost, TimingCache
from quant_core.model import graph, subgraph
from quant_core.model.normalize import normalize
from quant_core.model.session import Feed, open_session
from quant_core.model.values import values_of
from quant_core.numerics.granularity import PerTensor
from quant_core.plan.types import Compute, NodePlan, QuantPlan, Storage
from quant_core.rewrite.apply import apply_plan
from quant_core.search.policy import POLICY
from quant_core.search.variants import is_matmul


def matmul_costs(
    model: ir.Model,
    plans: Iterable[QuantPlan],
    stats: Statistics | None,
    feed: Feed,
    costs: TimingCache,
) -> dict[str, dict[Compute, Cost]]:
    """Node -> how it computes in one of the plans -> what that costs on this feed.

    Each MatMul is cut out and run by itself, once for all that multiply tensors of the same shapes.
    One that computes in the same way in all plans is left out: a Gemm with a computed bias, say.

    model  the float model that the plans are for
    feed   one value per input of the model
    costs  what was timed before, and what will be

    Raises: ModelError if the model does not run on the feed.
    """
    nodes = {n.name: n for n in model.graph}
    planned = {
        (n.node, n.compute): (plan, n)
        for plan in plans
        for n in plan.nodes
        if is_matmul(n) and n.node in nodes and _reads_one_tensor(nodes[n.node])
    }
    ways = Counter(name for name, _ in planned)
    planned = {key: made for key, made in planned.items() if ways[key[0]] > 1}
    inputs = {name: graph.name_of(nodes[name].inputs[0]) for name, _ in planned}
    found: dict[str, dict[Compute, Cost]] = {}
    for values in values_of(model, inputs.values(), [feed], packed=False):
        for (name, compute), (plan, node) in planned.items():
            tensor = inputs[name]
            if tensor not in values:
                continue
            single = _SingleMatMul(
                nodes[name], _plan_of_one(plan, node, tensor), tensor, values[tensor]
            )
            cost = costs.of(single.description(), partial(single.time, model, stats))
            found.setdefault(name, {})[compute] = cost
    return found


def _reads_one_tensor(node: ir.Node) -> bool:
    """Whether all but the first operand are constants, of which the second is a weight."""
    others = [value for value in node.inputs[1:] if value is not None]
    return graph.is_float_weight(others[0]) and all(graph.is_constant(v) for v in others)


@dataclass(frozen=True, slots=True, eq=False)
class _SingleMatMul:
    """One node, the plan for it alone, and the tensor that it reads with a value of it."""

    node: ir.Node
    plan: QuantPlan
    tensor: str
    value: NDArray[Any]

    def description(self) -> str:
        """All that the cost depends on, as a key of the timing cache."""
        planned, outliers = self.plan.nodes[0], self.plan.outliers
        weight = graph.shape_of(graph.value(self.node.inputs[1]))
        words = [
            self.node.op_type,
            "x".join(map(str, self.value.shape)),
            "x".join(map(str, weight)),
            planned.compute,
            planned.storage or "",
        ]
        if planned.storage is Storage.INT4:
            words.append(f"block {self.plan.config.block_size}")
        if self.plan.config.per_channel and planned.granularity == PerTensor():
            words.append("one scale")
        if any(treatment.split for treatment in outliers.values()):
            words.append("split")
        if outliers:
            words.append("smooth")
        words.append(f"for {self.plan.target}")
        return " ".join(words)

    def time(self, model: ir.Model, stats: Statistics | None) -> Timing:
        """The time of the node cut out of the model, quantized by its plan, against float's."""
        feed = {self.tensor: self.value}
        output = str(self.node.outputs[0].name)
        cut_out = ir.from_proto(subgraph.extract(model, [self.node], {output}, feed))
        normalize(cut_out)
        in_float = open_session(cut_out)
        quantized = open_session(apply_plan(cut_out, self.plan, stats).model)
        seconds = POLICY.matmul_seconds
        return measure(in_float, quantized, feed, seconds=seconds, clock=time.thread_time)


def _plan_of_one(plan: QuantPlan, node: NodePlan, tensor: str) -> QuantPlan:
    """The plan of this node alone, which reads that tensor."""
    is_static = node.compute is Compute.STATIC
    is_dynamic = node.compute is Compute.DYNAMIC
    outliers = {t: how for t, how in plan.outliers.items() if t == tensor and is_dynamic}
    return replace(
        plan,
        nodes=(node,),
        activations={tensor: plan.activations[tensor]} if is_static else {},
        means={},
        outliers=outliers,
        constants={},
    )

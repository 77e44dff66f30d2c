"""How a node with weights computes: as was chosen or as the mode wants, if a kernel can."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from quant_core.config import Mode
from quant_core.plan.convolutions import is_depthwise, is_pointwise
from quant_core.plan.operators import RULES, DynamicPattern, why_not_integer
from quant_core.plan.targets import Target
from quant_core.plan.types import Compute, NodeChoice

_MODES: Mapping[str, tuple[Compute, ...]] = {
    Mode.STATIC: (Compute.STATIC,),
    Mode.DYNAMIC: (Compute.DYNAMIC,),
    Mode.AUTO: (Compute.STATIC, Compute.DYNAMIC),
}


def choose_compute(
    node: ir.Node, target: Target, mode: str, choice: NodeChoice
) -> tuple[Compute, str]:
    """(compute, reason): what was chosen if the node can, else what the mode wants, else float."""
    rule, obstacle, chosen = RULES[node.op_type], _why_no_kernel(node, target), choice.compute
    possible = {Compute.FLOAT}
    if not obstacle:
        possible.update(compute for compute in rule.computes if compute in target.times)
        # only where a search chose it: a mode says nothing of what is faster
        if chosen is Compute.DYNAMIC and is_pointwise(node) and chosen in target.times:
            possible.add(chosen)
    if chosen in possible and len(possible) > 1:
        return chosen, "" if chosen.is_integer else choice.reason
    if mode == Mode.WEIGHT_ONLY:
        return Compute.FLOAT, "weight-only"
    wanted = _MODES[mode]
    best = next((compute for compute in wanted if compute in possible), None)
    if best is not None:
        return best, ""
    kernels = " or ".join(wanted)
    no_kernel = f"{node.op_type} has no {kernels} integer kernel that is faster than float"
    if any(compute in rule.computes for compute in wanted):
        no_kernel += f" on {target.name}"
    return Compute.FLOAT, obstacle or no_kernel


def _why_no_kernel(node: ir.Node, target: Target) -> str:
    """Why no integer kernel of the target computes the node, or none that is faster; "" if one
    does.
    """
    rule = RULES[node.op_type]
    if rule.dynamic_pattern is DynamicPattern.LSTM and not target.is_onnxruntime:
        return f"{rule.dynamic_pattern} is onnxruntime's own, not for {target.name}"
    obstacle = why_not_integer(node)
    if obstacle:
        return obstacle
    source = node.inputs[0].producer() if node.inputs[0] is not None else None
    if source is not None and source.op_type == "AveragePool" and why_not_integer(source):
        # a Q behind the pool would make it a QLinearAveragePool, whatever the plan says of the pool
        return f"behind {source.name}: {why_not_integer(source)}"
    kernel = "depthwise Conv" if is_depthwise(node) else node.op_type
    if kernel in target.slow_in_integers:
        return f"{kernel} is slower in integers on {target.name}"
    return ""

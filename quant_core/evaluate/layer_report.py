"""How each node of a quantized model computes and is stored, and what that costs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import onnx_ir as ir

from quant_core.evaluate.saturation_check import saturation_of
from quant_core.evaluate.sensitivity import Sensitivity
from quant_core.model import graph
from quant_core.plan.types import Compute, NodePlan, QuantPlan
from quant_core.rewrite.apply import Quantized


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One planned node: a row of the layers table.

    compute, storage       words of `Compute` and `Storage`; storage is "" without a weight
    weight                 names of the weights, joined by ", "
    elements               number of elements of the weights
    scale, zero_point      of the node's output, if the node is static and its output is quantized
    sqnr_db                signal-to-quantization-noise ratio of the weight
    isolated_db            the same of the output, with the float model's inputs
    cumulative_db          the same of the output, in the quantized model
    saturation_safe        whether no pair of weights can saturate on x86 without VNNI
    reason                 why the plan decided so
    """

    node: str
    op_type: str
    compute: str
    storage: str
    weight: str
    elements: int
    scale: float | None
    zero_point: int | None
    sqnr_db: float | None
    isolated_db: float | None
    cumulative_db: float | None
    saturation_safe: bool
    reason: str


def layer_reports(
    plan: QuantPlan, quantized: Quantized, sensitivities: Iterable[Sensitivity] = ()
) -> list[LayerReport]:
    """One row for each node of the plan, in its order.

    quantized      what `apply_plan` made of the plan
    sensitivities  of nodes where they were measured
    """
    sensitivity_of = {sensitivity.node: sensitivity for sensitivity in sensitivities}
    return [
        _layer_report(planned, quantized, sensitivity_of.get(planned.node))
        for planned in plan.nodes
    ]


def _layer_report(
    planned: NodePlan, quantized: Quantized, sensitivity: Sensitivity | None
) -> LayerReport:
    written = quantized.written.get(planned.node)
    scale = zero_point = None
    saturating = None
    if written is not None:
        saturating = saturation_of(written)
        if planned.compute == Compute.STATIC:
            scale, zero_point = _output_params(written)
    return LayerReport(
        node=planned.node,
        op_type=planned.op_type,
        compute=str(planned.compute),
        storage=str(planned.storage or ""),
        weight=", ".join(planned.weights),
        elements=planned.elements,
        scale=scale,
        zero_point=zero_point,
        sqnr_db=quantized.weight_sqnr_db.get(planned.node),
        isolated_db=sensitivity.isolated_db if sensitivity is not None else None,
        cumulative_db=sensitivity.cumulative_db if sensitivity is not None else None,
        saturation_safe=saturating is None or not saturating.pairs,
        reason=planned.reason,
    )


def _output_params(node: ir.Node) -> tuple[float | None, int | None]:
    """Scale and zero point of the QuantizeLinear that reads the node, (None, None) without one.

    A Relu or Clip in between is fused with the node.
    """
    for reader in graph.consumers(node.outputs[0]):
        if reader.op_type in ("Relu", "Clip"):
            return _output_params(reader)
        if reader.op_type == "QuantizeLinear":
            scale, zero_point = (graph.constant(v) for v in reader.inputs[1:3])
            if scale is None or zero_point is None:
                return None, None
            return float(scale), int(zero_point)
    return None, None

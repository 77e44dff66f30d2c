"""How each node of a quantized model computes and is stored, and what that costs."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quant_core.calibrate.observe import Statistics
from quant_core.calibrate.range_errors import Histogram
from quant_core.evaluate.saturation_check import saturation_of
from quant_core.evaluate.sensitivity import Sensitivity
from quant_core.model import graph
from quant_core.optimize.applied import rules_of
from quant_core.plan.operators import CAPS
from quant_core.plan.types import Compute, NodePlan, QuantPlan
from quant_core.rewrite.apply import Quantized

BINS = 24  # of the histogram that people see


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
    seen_lo, seen_hi       least and largest value of the output that calibration saw
    range_lo, range_hi     what the output's integers cover
    histogram              per mille of the values in equal bins from seen_lo to seen_hi, as JSON
    saturation_safe        whether no pair of weights can saturate on x86 without VNNI
    rewrites               the rules that rewrote the float node, joined by ", "
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
    seen_lo: float | None = None
    seen_hi: float | None = None
    range_lo: float | None = None
    range_hi: float | None = None
    histogram: str = ""
    rewrites: str = ""


def layer_reports(
    plan: QuantPlan,
    quantized: Quantized,
    sensitivities: Iterable[Sensitivity] = (),
    stats: Statistics | None = None,
) -> list[LayerReport]:
    """One row for each node of the plan, in its order.

    quantized      what `apply_plan` made of the plan
    sensitivities  of nodes where they were measured
    stats          what ranges were chosen by, None without samples
    """
    sensitivity_of = {sensitivity.node: sensitivity for sensitivity in sensitivities}
    rules = rules_of(plan.rewrites)
    return [
        replace(
            _layer_report(planned, quantized, sensitivity_of.get(planned.node), stats),
            rewrites=", ".join(rules.get(planned.node, ())),
        )
        for planned in plan.nodes
    ]


def _layer_report(
    planned: NodePlan,
    quantized: Quantized,
    sensitivity: Sensitivity | None,
    stats: Statistics | None,
) -> LayerReport:
    written = quantized.written.get(planned.node)
    scale = zero_point = None
    saturating = None
    ranges: dict[str, Any] = {}
    if written is not None:
        saturating = saturation_of(written)
        if planned.compute == Compute.STATIC:
            output = _quantized_output(written)
            if output is not None:
                scale, zero_point = float(output.scale), int(output.zero_point)
                ranges = _ranges(output, stats)
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
        **ranges,
    )


@dataclass(frozen=True, slots=True)
class _Output:
    """A tensor that is quantized: its name, and the parameters of its integers."""

    tensor: str
    scale: NDArray[Any]
    zero_point: NDArray[Any]


def _quantized_output(node: ir.Node) -> _Output | None:
    """What the QuantizeLinear that reads the node makes of it, None without one.

    A Relu or Clip in between is fused with the node.
    """
    for reader in graph.consumers(node.outputs[0]):
        if reader.op_type in CAPS:
            return _quantized_output(reader)
        if reader.op_type == "QuantizeLinear":
            scale, zero_point = (graph.constant(v) for v in reader.inputs[1:3])
            if scale is None or zero_point is None:
                return None
            return _Output(str(node.outputs[0].name), scale, zero_point)
    return None


def _ranges(output: _Output, stats: Statistics | None) -> dict[str, Any]:
    """What the integers of a tensor cover, and what calibration saw of it."""
    limits = np.iinfo(output.zero_point.dtype)
    steps = [limit - int(output.zero_point) for limit in (limits.min, limits.max)]
    lo, hi = (float(step * output.scale) for step in steps)
    found: dict[str, Any] = {"range_lo": lo, "range_hi": hi}
    seen = stats.tensors.get(output.tensor) if stats is not None else None
    if seen is not None and seen.counts.any():
        outline = Histogram.of(seen).outline(BINS)
        found |= {"seen_lo": float(seen.lo), "seen_hi": float(seen.hi)}
        found["histogram"] = json.dumps(outline)
    return found

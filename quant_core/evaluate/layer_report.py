"""What became of each node: the rows of the layers table."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import onnx_ir as ir

from quant_core.evaluate.power import NodeDamage
from quant_core.evaluate.saturation_check import saturation_of
from quant_core.model import graph
from quant_core.plan.types import Compute, NodePlan, QuantPlan
from quant_core.rewrite.apply import Quantized


def layer_rows(
    plan: QuantPlan, quantized: Quantized, damaged: Iterable[NodeDamage] = ()
) -> list[dict[str, Any]]:
    """One row per planned node: how it computes and is stored, the scale and zero point of what it writes, what
    rounding costs (sqnr_db: the weight by itself; alone_db and so_far_db: its output, see sensitivity.py), and why."""
    found = {d.node: d for d in damaged}
    return [
        _layer_row(
            n,
            quantized.written.get(n.node),
            quantized.weight_sqnr_db.get(n.node),
            found.get(n.node),
        )
        for n in plan.nodes
    ]


def _layer_row(
    planned: NodePlan, node: ir.Node | None, sqnr_db: float | None, damaged: NodeDamage | None
) -> dict[str, Any]:
    scale, zero = (
        _output_params(node)
        if planned.compute == Compute.STATIC and node is not None
        else (None, None)
    )
    pairs = saturation_of(node) if node is not None else None
    return {
        "node": planned.node, "op_type": planned.op_type, "compute": str(planned.compute), "storage": str(planned.storage or ""),
        "weight": ", ".join(planned.weights), "elements": planned.elements, "scale": scale, "zero_point": zero,
        "sqnr_db": sqnr_db, "alone_db": damaged.alone_db if damaged else None,
        "so_far_db": damaged.so_far_db if damaged else None, "saturation_safe": not (pairs and pairs["pairs"]),
        "reason": planned.reason,
    }  # fmt: skip


def _output_params(node: ir.Node) -> tuple[float | None, int | None]:
    """Scale and zero point of the QuantizeLinear behind a node, or behind the Relu or Clip that it is fused with."""
    for reader in graph.consumers(node.outputs[0]):
        if reader.op_type == "QuantizeLinear":
            scale, zero = graph.constant(reader.inputs[1]), graph.constant(reader.inputs[2])
            return (
                (float(scale), int(zero))
                if scale is not None and zero is not None
                else (None, None)
            )
        if reader.op_type in ("Relu", "Clip"):
            return _output_params(reader)
    return None, None

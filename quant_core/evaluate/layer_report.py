"""What became of each node: the rows of the layers table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import onnx_ir as ir

from quant_core.evaluate.power import NodeDamage
from quant_core.evaluate.saturation_check import saturation_of
from quant_core.model import graph
from quant_core.plan.make import STATIC, NodePlan
from quant_core.rewrite.apply import weight_sqnr
from quant_core.search.candidate import Candidate


def layer_rows(candidate: Candidate, damaged: Iterable[NodeDamage] = ()) -> list[dict[str, Any]]:
    """One row per planned node: how it computes and is stored, the scale and zero point of what it writes, what
    rounding costs (sqnr_db: the weight by itself; alone_db and so_far_db: its output, see damage.py), and why."""
    found = {d.node: d for d in damaged}
    nodes = {n.name: n for g in graph.graphs_of(candidate.model) for n in g}
    sqnr = weight_sqnr(candidate.model)
    return [
        _layer_row(n, _written(n, nodes), sqnr.get(n.node), found.get(n.node))
        for n in candidate.plan.nodes
    ]


def _written(planned: NodePlan, nodes: Mapping[str | None, ir.Node]) -> ir.Node | None:
    """The node, or the one that dynamic.py wrote in its place."""
    names = (planned.node, f"{planned.node}_integer", f"{planned.node}_int8")
    return next((nodes[name] for name in names if name in nodes), None)


def _layer_row(
    planned: NodePlan, node: ir.Node | None, sqnr_db: float | None, damaged: NodeDamage | None
) -> dict[str, Any]:
    scale, zero = (
        _output_params(node) if planned.compute == STATIC and node is not None else (None, None)
    )
    pairs = saturation_of(node) if node is not None else None
    return {
        "node": planned.node, "op_type": planned.op_type, "compute": planned.compute, "storage": planned.storage,
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

"""What the plan, the layers report and the file say of every node, compared."""

from __future__ import annotations

import onnx_ir as ir

from quant_core.evaluate.layer_report import layer_reports
from quant_core.numerics.granularity import PerBlock
from quant_core.plan.operators import RULES
from quant_core.plan.types import Compute, QuantPlan
from quant_core.rewrite.apply import Quantized

INTEGER_OPERATORS = {
    "MatMulInteger": Compute.DYNAMIC,
    "DynamicQuantizeLSTM": Compute.DYNAMIC,
    "MatMulNBits": Compute.BLOCKS,
}


def written_compute(node: ir.Node) -> Compute:
    """How onnxruntime will compute the node: by its operator, or by what its data and weight come
    from.
    """
    if node.op_type in INTEGER_OPERATORS:
        return INTEGER_OPERATORS[node.op_type]
    sources = [v.producer() for v in node.inputs[:2] if v is not None]
    dequantized = [n is not None and n.op_type == "DequantizeLinear" for n in sources]
    has_kernel = Compute.STATIC in RULES[node.op_type].computes
    return Compute.STATIC if has_kernel and all(dequantized) else Compute.FLOAT


def assert_they_agree(plan: QuantPlan, made: Quantized) -> None:
    """Of every node: how it computes, and in what its weight is stored."""
    nodes, rows = plan.nodes, layer_reports(plan, made)
    assert len(rows) == len(nodes)
    for planned, row in zip(nodes, rows, strict=True):
        assert row.node == planned.node
        assert row.compute == str(planned.compute)
        assert row.storage == str(planned.storage or "")
        if not planned.weights or RULES[planned.op_type].is_table:
            continue
        node = made.written[planned.node]
        assert written_compute(node) is planned.compute, planned.node
        if planned.compute is Compute.BLOCKS:
            assert PerBlock(node.attributes["block_size"].value) == planned.granularity

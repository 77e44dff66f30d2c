"""Which nodes of a quantized model, whoever made it, can saturate on x86 CPUs without VNNI."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quant_core import graph
from quant_core.saturation import unsafe_pairs
from quant_core.weights import layout_of


def saturating_nodes(path: Path) -> list[dict[str, Any]]:
    """One row per node of an INT8 model that can saturate on x86 without VNNI: node, op_type, pairs, first."""
    model = graph.normalize(graph.load(path))
    return [row for node in model.graph if (row := saturation_of(node)) is not None and row["pairs"]]


def saturation_of(node: ir.Node) -> dict[str, Any] | None:
    """What can saturate in a node with int8 weights behind a DequantizeLinear or straight in a MatMulInteger."""
    if node.op_type not in ("Conv", "Gemm", "MatMul", "MatMulInteger") or len(node.inputs) < 2:
        return None
    source = node.inputs[1]
    producer = source.producer() if source is not None else None
    if producer is not None and producer.op_type == "DequantizeLinear":
        source = producer.inputs[0]
    weight = _folded(source)
    if weight is None or weight.dtype != np.int8 or node.inputs[0] is None:
        return None
    if node.op_type != "MatMulInteger" and not _is_dequantized(node.inputs[0]):
        return None
    rows = layout_of(node, weight.ndim).matrix(weight)
    if node.op_type == "Conv" and graph.attribute(node, "group", 1) > 1 and weight.shape[1] == 1:
        return None  # depthwise kernels add in int32
    pairs = unsafe_pairs(rows)
    return {"node": node.name, "op_type": node.op_type, "pairs": len(pairs), "first": pairs[:3].tolist()}


def _is_dequantized(value: ir.Value) -> bool:
    producer = value.producer()
    return producer is not None and producer.op_type == "DequantizeLinear"


def _folded(value: ir.Value | None) -> NDArray[Any] | None:
    """The constant behind a value, through the nodes that onnxruntime folds when it loads (store.py)."""
    found = graph.constant(value)
    if found is not None or value is None or (node := value.producer()) is None:
        return found
    inputs = [_folded(v) for v in node.inputs]
    if any(i is None for i in inputs):
        return None
    first: NDArray[Any] = inputs[0]  # type: ignore[assignment]
    match node.op_type:
        case "Cast":
            return first.astype(ir.DataType(graph.attribute(node, "to", 1)).numpy())
        case "Mul":
            return np.asarray(first * inputs[1])
        case "Reshape":
            return first.reshape(inputs[1])
        case "Transpose":
            return first.transpose(graph.attribute(node, "perm", None))
    return None

"""Which nodes of a quantized model, whoever made it, can saturate on x86 CPUs without VNNI."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quant_core.model import files, graph
from quant_core.model.normalize import normalize
from quant_core.numerics.saturation import unsafe_pairs
from quant_core.plan.operators import RULES, layout_of, multiplied_weights


def saturating_nodes(path: Path) -> list[dict[str, Any]]:
    """One row per node of an INT8 model that can saturate on x86 without VNNI: node, op_type, pairs, first."""
    model = files.load(path)
    normalize(model)
    nodes = (node for g in graph.graphs_of(model) for node in g)
    return [row for node in nodes if (row := saturation_of(node)) is not None and row["pairs"]]


def saturation_of(node: ir.Node) -> dict[str, Any] | None:
    """What can saturate in a node with int8 weights: how many pairs, and the first ones; None if it has none.

    Behind a DequantizeLinear, if the activations are dequantized too; or straight in an operator on integers.
    """
    weights = multiplied_weights().get(node.op_type)
    if weights is None:
        return None
    found = [
        pairs for i in weights if i < len(node.inputs) and (pairs := _pairs(node, i)) is not None
    ]
    if not found:
        return None
    first = [pair for pairs in found for pair in pairs[:3].tolist()][:3]
    return {
        "node": node.name,
        "op_type": node.op_type,
        "pairs": sum(map(len, found)),
        "first": first,
    }


def _pairs(node: ir.Node, position: int) -> NDArray[Any] | None:
    """The unsafe pairs of the int8 weight at that input, None if there is none or its kernel adds in int32."""
    source = node.inputs[position]
    producer = source.producer() if source is not None else None
    if producer is not None and producer.op_type == "DequantizeLinear":
        source = producer.inputs[0]
    weight = _folded(source)
    if weight is None or weight.dtype != np.int8:
        return None
    if node.op_type in RULES and not _is_dequantized(node.inputs[0]):
        return None
    if "Conv" in node.op_type and graph.attribute(node, "group", 1) > 1 and weight.shape[1] == 1:
        return None  # depthwise
    return unsafe_pairs(layout_of(node, weight.ndim).matrix(weight))


def _is_dequantized(value: ir.Value | None) -> bool:
    """Whether it comes from 8 bits: activations of 16 do not fuse, so their operator computes in float."""
    producer = value.producer() if value is not None else None
    if producer is None or producer.op_type != "DequantizeLinear":
        return False
    zero = graph.constant(producer.inputs[2]) if len(producer.inputs) > 2 else None
    return zero is None or zero.dtype.itemsize == 1


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

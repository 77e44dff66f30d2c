"""Which nodes of a quantized model, whoever made it, can saturate on x86 CPUs without VNNI."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quant_core.model import graph
from quant_core.numerics.saturation import unsafe_pairs
from quant_core.plan.operators import RULES, layout_of, multiplied_weights

SHOWN_PAIRS = 3


@dataclass(frozen=True, slots=True)
class SaturatingNode:
    """A node with pairs of int8 weights whose products with uint8 activations can saturate int16.

    pairs  number of such pairs, 0 if the weights are safe
    first  [channel, pair] of the first three
    """

    node: str
    op_type: str
    pairs: int
    first: list[list[int]]


def saturating_nodes(model: ir.Model) -> list[SaturatingNode]:
    """The nodes of a normalized model that can saturate, in graph order, subgraphs included."""
    rows = [saturation_of(node) for node in graph.nodes_of(model)]
    return [row for row in rows if row is not None and row.pairs]


def saturation_of(node: ir.Node) -> SaturatingNode | None:
    """What can saturate in a node, None if it does not multiply uint8 by int8 weights.

    It does if it is an operator on integers, or an operator on floats that reads both activations
    and weights from DequantizeLinear nodes, which onnxruntime fuses into one on integers.
    """
    weights = multiplied_weights().get(node.op_type)
    if weights is None:
        return None
    found = []
    for position in weights:
        if position < len(node.inputs):
            pairs = _unsafe_pairs(node, position)
            if pairs is not None:
                found.append(pairs)
    if not found:
        return None
    first = [pair for pairs in found for pair in pairs[:SHOWN_PAIRS].tolist()]
    count = sum(len(pairs) for pairs in found)
    return SaturatingNode(str(node.name), node.op_type, count, first[:SHOWN_PAIRS])


def _unsafe_pairs(node: ir.Node, position: int) -> NDArray[Any] | None:
    """The unsafe pairs (P, 2) of the int8 weight at that input.

    None if it is no int8 weight, or if the kernel adds the products in int32.
    """
    source = node.inputs[position]
    producer = source.producer() if source is not None else None
    if producer is not None and producer.op_type == "DequantizeLinear":
        source = producer.inputs[0]
    weight = _folded(source)
    if weight is None or weight.dtype != np.int8:
        return None
    if node.op_type in RULES and not _is_dequantized(node.inputs[0]):
        return None
    if "Conv" in node.op_type and weight.shape[:2] == (graph.attribute(node, "group", 1), 1):
        return None  # depthwise: its kernel adds in int32
    return unsafe_pairs(layout_of(node, weight.ndim).matrix(weight))


def _is_dequantized(value: ir.Value | None) -> bool:
    """Whether a DequantizeLinear makes the value from 8-bit integers.

    Activations of 16 bits do not fuse, so that their operator computes in float.
    """
    producer = value.producer() if value is not None else None
    if producer is None or producer.op_type != "DequantizeLinear":
        return False
    zero = graph.constant(graph.input_at(producer, 2))
    return zero is None or zero.dtype.itemsize == 1


def _folded(value: ir.Value | None) -> NDArray[Any] | None:
    """The constant behind a value, through the nodes that onnxruntime folds when it loads a model.

    None if it depends on something computed. Each value is folded once: on a residual graph the
    paths to its inputs are exponentially many. The walk is a loop because chains of nodes can be
    longer than Python's stack is deep.
    """
    if value is None:
        return None
    constants: dict[ir.Value, NDArray[Any]] = {}
    waiting = [value]
    while waiting:
        current = waiting[-1]
        known = constants.get(current, graph.constant(current))
        if known is None:
            node = current.producer()
            if node is None or node.op_type not in FOLDED:
                return None
            inputs = [v for v in node.inputs if v is not None]
            missing = [v for v in inputs if v not in constants]
            if missing:
                waiting.extend(missing)
                continue
            known = FOLDED[node.op_type](node, [constants[v] for v in inputs])
        constants[current] = known
        waiting.pop()
    return constants[value]


def _sizes(node: ir.Node, array: NDArray[Any], shape: NDArray[Any]) -> list[int]:
    """The sizes that a Reshape asks for: 0 is the input's, unless `allowzero` says otherwise."""
    if graph.attribute(node, "allowzero", 0):
        return [int(size) for size in shape]
    return [int(size) or array.shape[axis] for axis, size in enumerate(shape)]


Fold = Callable[[ir.Node, list[NDArray[Any]]], NDArray[Any]]

# operator -> its result, from the node and its constant inputs
FOLDED: Mapping[str, Fold] = {
    "Cast": lambda node, inputs: inputs[0].astype(
        ir.DataType(graph.attribute(node, "to", 1)).numpy()
    ),
    "Mul": lambda node, inputs: np.asarray(inputs[0] * inputs[1]),
    "Reshape": lambda node, inputs: inputs[0].reshape(_sizes(node, *inputs)),
    "Transpose": lambda node, inputs: inputs[0].transpose(graph.attribute(node, "perm", None)),
}

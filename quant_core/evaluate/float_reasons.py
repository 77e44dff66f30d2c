"""Why a kernel computes in float."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import onnx_ir as ir

from quant_core.model import graph
from quant_core.model.compact import made_of_constants
from quant_core.plan.operators import CAPS, RULES, Kind, Operator, rule_of, why_not_integer

NOT_QUANTIZED = "the file is not quantized"


def why_float(
    op_type: str,
    nodes: Sequence[ir.Node],
    unpacked: Collection[ir.Value],
    *,
    is_quantized: bool,
) -> str:
    """Why a kernel of that operator, which stands for these nodes of the file, is in float.

    1. If some of the nodes multiply by weights, the reason is that of the first.
    2. Else it is that of the node of the kernel's own operator.
    3. A kernel that stands for no such node is a fused one, or its nodes are not known.

    unpacked      what the file computes from the integers of weights; see `unpacked_weights`
    is_quantized  whether the file `has_integers`
    """
    weighted = [node for node in nodes if multiplies_by_weight(node)]
    if weighted:  # 1
        return _why_weighted(weighted[0], unpacked) if is_quantized else NOT_QUANTIZED
    rule = RULES.get(op_type)
    if op_type in CAPS:
        return "what it caps is computed in float"
    if rule is None:
        return f"no faster integer kernel for {op_type} is known"
    if not is_quantized:
        return NOT_QUANTIZED
    if rule.is_table:
        return "the table that it picks from is in float"
    if rule.kind is Kind.WEIGHT_ONLY:
        return _no_kernel(op_type)
    own = [node for node in nodes if node.op_type == op_type]
    return _why_unweighted(own[0], rule) if own else ""  # 2, 3


def has_integers(model: ir.Model) -> bool:
    """Whether any node of the file computes in a quantizer's integers, or unpacks weights."""
    return graph.is_quantized(model) or bool(unpacked_weights(model))


def multiplies_by_weight(node: ir.Node) -> bool:
    """Whether the node has a weight that it multiplies by, and does not only pick rows from."""
    rule = rule_of(node)
    return rule is not None and bool(rule.weights) and not rule.is_table


def unpacked_weights(model: ir.Model) -> set[ir.Value]:
    """What nodes make of constants in 8 bits or fewer, and onnxruntime folds when it loads them."""
    found: set[ir.Value] = set()
    for made, node in made_of_constants(model).items():
        if any(value in found or _holds_integers(value) for value in node.inputs):
            found.add(made)
    return found


def _holds_integers(value: ir.Value | None) -> bool:
    dtype = None if value is None or value.const_value is None else value.const_value.dtype
    return dtype is not None and dtype.is_integer() and dtype.bitwidth <= 8


def _why_weighted(node: ir.Node, unpacked: Collection[ir.Value]) -> str:
    rule = RULES[node.op_type]
    weights = _inputs(node, rule.weights)
    has_integer_weight = any(graph.is_dequantized(w) or w in unpacked for w in weights)
    if not has_integer_weight and not any(map(graph.is_constant, weights)):
        return "it multiplies two computed tensors that are not quantized"
    has_integer_data = all(map(graph.is_dequantized, _inputs(node, rule.data)))
    if not has_integer_weight and not has_integer_data:
        return "neither its weight nor its input is quantized"
    if not has_integer_weight:
        return "its weight is in float"
    if not has_integer_data:
        return "only its weight is quantized; it is unpacked when the model loads"
    if rule.kind is Kind.WEIGHT_ONLY:
        return _no_kernel(node.op_type)
    return _why_not_fused(node, rule)


def _why_unweighted(node: ir.Node, rule: Operator) -> str:
    data = _inputs(node, rule.data or range(len(node.inputs)))
    if not all(map(graph.is_dequantized, data)):
        some = "some of its inputs are" if any(map(graph.is_dequantized, data)) else "its input is"
        return f"{some} computed in float"
    return _why_not_fused(node, rule)


def _why_not_fused(node: ir.Node, rule: Operator) -> str:
    """Why a node whose inputs are quantized has no integer kernel."""
    if obstacle := why_not_integer(node):
        return obstacle
    if rule.needs_q and not all(_is_quantized_again(value) for value in node.outputs):
        return "its output is not quantized, which its integer kernel needs"
    return "onnxruntime did not fuse it with the conversions around it"


def _no_kernel(op_type: str) -> str:
    return f"onnxruntime has no integer kernel for {op_type}"


def _inputs(node: ir.Node, positions: Iterable[int]) -> list[ir.Value | None]:
    return [graph.input_at(node, i) for i in positions]


def _is_quantized_again(value: ir.Value) -> bool:
    """Whether every reader quantizes the value, at once or behind a clipping that fuses."""
    readers = [usage.node for usage in value.uses()]
    if not readers:
        return False
    return all(
        reader.op_type == "QuantizeLinear"
        or (
            reader.op_type in CAPS and all(_is_quantized_again(output) for output in reader.outputs)
        )
        for reader in readers
    )

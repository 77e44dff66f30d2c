"""Why no node of a model has a weight that can be quantized: the error that says so."""

from __future__ import annotations

import onnx_ir as ir

from quant_core.errors import ModelError
from quant_core.model import graph
from quant_core.plan.operators import RULES, rule_of

WEIGHTS = frozenset({"coefficients", "support_vectors"})  # attributes of ai.onnx.ml


def nothing_to_quantize(model: ir.Model) -> ModelError:
    """The error for a model of which no node has a weight that can be quantized."""
    nodes = list(graph.nodes_of(model))
    if graph.is_quantized(model):
        return ModelError("the model is quantized already", hint="Start from its float original")
    trees = next((n.op_type for n in nodes if n.op_type.startswith("TreeEnsemble")), None)
    if trees is not None:
        return ModelError(
            f"nothing to quantize: {trees} compares with thresholds, and multiplies nothing",
            hint="Trees are small and fast as they are",
        )
    inside = next((n for n in nodes if _holds_weights(n)), None)
    if inside is not None:
        return ModelError(
            f"nothing to quantize: {inside.op_type} holds its weights in attributes, as floats",
            str(inside.name),
            "Such models are small and fast as they are",
        )
    left = next((n for n in nodes if n.op_type == "Gemm" and _is_on_left(n)), None)
    if left is not None:
        return ModelError(
            f"nothing to quantize: the weight of {left.op_type} is its left operand",
            str(left.name),
            "Weights are quantized as right operands: transpose the product",
        )
    replaceable = [v for n in nodes if rule_of(n) for v in _replaceable_weights(n)]
    if replaceable:
        return ModelError(
            "nothing to quantize: its weights are inputs, which whoever runs it may replace",
            replaceable[0],
            "Export without keep_initializers_as_inputs",
        )
    if not nodes:
        return ModelError(
            "nothing to quantize: it computes nothing but constants, or gives its inputs back",
            hint="--optimize-only writes it without what it computes of constants",
        )
    others = sorted({n.op_type for n in nodes})
    shown = ", ".join(others[:8]) + (", ..." if len(others) > 8 else "")
    return ModelError(
        f"nothing to quantize: none of its operators ({shown}) has a weight of its own",
        hint=f"Weights are constants of {', '.join(n for n in RULES if RULES[n].weights)}",
    )


def _replaceable_weights(node: ir.Node) -> list[str]:
    """The weights that are inputs of the model, with default values."""
    operands = [graph.input_at(node, i) for i in RULES[node.op_type].weights]
    return [str(v.name) for v in operands if v and v.is_graph_input() and v.const_value is not None]


def _holds_weights(node: ir.Node) -> bool:
    """Whether it is a linear model or a support vector machine of ai.onnx.ml."""
    return node.domain == "ai.onnx.ml" and not WEIGHTS.isdisjoint(node.attributes)


def _is_on_left(node: ir.Node) -> bool:
    return graph.is_float_weight(node.inputs[0])

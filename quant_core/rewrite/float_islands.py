"""Float nodes between integers, written so that onnxruntime leaves them in float.

When it loads a model, onnxruntime's WeightBiasQuantization takes a float Conv, ConvTranspose or
Gemm that stands alone between a DequantizeLinear and a QuantizeLinear, and rounds its weight to
int8 with one scale for all channels. A node that was to stay exact is then the least exact of all:

    DequantizeLinear -> Conv -> [Relu or Clip] -> QuantizeLinear        becomes QLinearConv

What is written instead:

    1. DequantizeLinear -> com.microsoft.FusedConv -> ... -> QuantizeLinear   as fast as a Conv
    2. DequantizeLinear -> Gemm -> ... -> Sum -> QuantizeLinear               one input: a copy

Its QDQPropagation moves a DequantizeLinear behind operators that only move values. Where a branch
or body reads what these give, it writes beyond the inputs of the If, and the process aborts:

    3. DequantizeLinear -> Reshape -> Sum -> If

Source: onnxruntime 1.32, core/optimizer/qdq_transformer, weight_bias_quantization.cc and
qdq_propagation.cc; held by tests/facts/test_float_islands.py.
"""

from __future__ import annotations

import onnx_ir as ir

from quant_core.model import graph
from quant_core.plan.operators import CAPS

TAKEN = frozenset({"Conv", "ConvTranspose", "Gemm"})
PASSED = frozenset({"Identity", "MaxPool", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"})


def keep_in_float(model: ir.Model, *, is_onnxruntime: bool) -> None:
    """Edit the quantized model in place so that its float nodes stay float when it is loaded.

    is_onnxruntime  whether operators of onnxruntime's own may be written
    """
    for node in graph.nodes_of(model, *TAKEN):
        end = _requantized_output(node)
        if (
            end is None
            or not graph.is_dequantized(node.inputs[0])
            or graph.is_dequantized(node.inputs[1])
        ):
            continue
        if node.op_type == "Conv" and is_onnxruntime:  # 1
            node.op_type, node.domain = "FusedConv", graph.MICROSOFT
        else:  # 2
            _insert_copy(graph.home(node), end)
    for node in _moving_dequantized(model):  # 3
        _copy_for_inner_graphs(node)


def _moving_dequantized(model: ir.Model) -> list[ir.Node]:
    """The operators that only move values, and move what a DequantizeLinear made."""
    found = []
    moved: set[ir.Value] = set()
    for node in graph.nodes_of(model, *PASSED):
        source = node.inputs[0]
        if source is not None and (source in moved or graph.is_dequantized(source)):
            moved.add(node.outputs[0])
            found.append(node)
    return found


def _requantized_output(node: ir.Node) -> ir.Value | None:
    """What a QuantizeLinear alone reads: the node's output, or that of its activation."""
    output = node.outputs[0]
    reader = graph.only_reader(output)
    if reader is not None and reader.op_type in CAPS:
        output = reader.outputs[0]
        reader = graph.only_reader(output)
    return output if reader is not None and reader.op_type == "QuantizeLinear" else None


def _insert_copy(inside: ir.Graph, value: ir.Value) -> None:
    """A Sum of this one value, which its only reader then reads."""
    (use,) = value.uses()
    copy = _copy_of(value)
    inside.insert_before(use.node, copy)
    use.node.replace_input_with(use.idx, copy.outputs[0])


def _copy_for_inner_graphs(node: ir.Node) -> None:
    """A Sum of what the node gives, if branches or bodies read that, which they then read."""
    inside, value = graph.home(node), node.outputs[0]
    within = [use for use in value.uses() if use.node.graph is not inside]
    if not within:
        return
    copy = _copy_of(value)
    inside.insert_after(node, copy)
    for use in within:
        use.node.replace_input_with(use.idx, copy.outputs[0])


def _copy_of(value: ir.Value) -> ir.Node:
    copy = ir.Node("", "Sum", [value], name=f"{value.name}_copy")
    copy.outputs[0].name = f"{value.name}_in_float"
    return copy

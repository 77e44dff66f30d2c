"""Pairs of quantization-aware training in the form that fuses on the target."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quant_core.model import graph
from quant_core.plan.targets import Target

INT32_MAX = 2**31 - 1
SHIFT = 128  # from int8 to uint8


def lower_pairs(model: ir.Model, target: Target) -> None:
    """Edit in place: int8 activations become uint8, where the target's kernels want that.

    1. The integers of a pair are shifted, which changes no value:

           QuantizeLinear(s, z: int8) -> DequantizeLinear(s, z)
         = QuantizeLinear(s, z + 128: uint8) -> DequantizeLinear(s, z + 128)

    2. Behind a Relu the negative half of a symmetric grid is empty. With zero point 0 instead of
       128 the Relu is part of the quantization, so that it fuses with the operator before it.
       Values that were clipped at the top of the grid no longer are.

    3. A float bias of a Conv or Gemm of integers becomes int32, with the scale of the products,
       unless the target's biases are float.

    Pairs between which other nodes move the integers stay as they are.
    """
    if target.integer_bias:
        for node in graph.nodes_of(model, "Conv", "Gemm"):
            _round_bias(model, node)
    if target.activation_signed or not target.is_onnxruntime:
        return
    shifted: dict[tuple[ir.Value, bool], ir.Value] = {}
    for node in graph.nodes_of(model, "QuantizeLinear"):
        _shift(model, node, shifted)


def _shift(
    model: ir.Model, quantize: ir.Node, shifted: dict[tuple[ir.Value, bool], ir.Value]
) -> None:
    """Edit in place: the pair whose first node this is."""
    old = graph.input_at(quantize, 2)
    if old is None or graph.is_constant(quantize.inputs[0]):
        return
    zero = graph.constant(old)
    readers = graph.consumers(quantize.outputs[0])
    if zero is None or zero.dtype != np.int8 or zero.size != 1:
        return
    if quantize.outputs[0].is_graph_output() or not all(_ends_pair(n, zero) for n in readers):
        return
    before = graph.value(quantize.inputs[0]).producer()
    is_rectified = before is not None and before.op_type == "Relu" and not zero.any()
    key = (old, is_rectified)
    if key not in shifted:
        new = zero.astype(np.int32) + (0 if is_rectified else SHIFT)
        name = f"{old.name}_rectified" if is_rectified else f"{old.name}_uint8"
        shifted[key] = graph.initializer(model.graph, name, new.astype(np.uint8))
    quantize.replace_input_with(2, shifted[key])
    quantize.outputs[0].type = ir.TensorType(ir.DataType.UINT8)
    for node in readers:
        node.replace_input_with(2, shifted[key])


def _round_bias(model: ir.Model, node: ir.Node) -> None:
    """Edit in place (rule 3): the bias (C,) of the node, if its other inputs are dequantized."""
    bias = graph.constant(graph.input_at(node, 2))
    scales = [_scale_of(value) for value in node.inputs[:2]]
    attributes = {name: graph.attribute(node, name, 1.0) for name in ("alpha", "beta")}
    if graph.attribute(node, "transA", 0) or any(value != 1 for value in attributes.values()):
        return
    if bias is None or bias.dtype != np.float32 or bias.ndim != 1:
        return
    if scales[0] is None or scales[1] is None or scales[0].size != 1:
        return
    scale = (scales[0].reshape(()) * scales[1]).astype(np.float32)
    if scale.shape not in ((), bias.shape) or not np.all(scale > 0):
        return
    steps = np.rint(bias / scale.astype(np.float64))
    if np.abs(steps).max(initial=0) > INT32_MAX:
        return
    name = f"{node.name}_bias"
    parts = {"int32": steps.astype(np.int32), "scale": scale}
    values = [graph.initializer(model.graph, f"{name}_{k}", a) for k, a in parts.items()]
    axis = [ir.AttrInt64("axis", 0)] if scale.ndim else []
    dequantize = ir.Node("", "DequantizeLinear", values, axis, name=f"{name}_dequantize")
    dequantize.outputs[0].name = f"{name}_dequantized"
    graph.home(node).insert_before(node, dequantize)
    node.replace_input_with(2, dequantize.outputs[0])


def _scale_of(value: ir.Value | None) -> NDArray[Any] | None:
    """The constant scale of the DequantizeLinear that writes the value."""
    producer = value.producer() if value is not None else None
    if producer is None or producer.op_type != "DequantizeLinear" or producer.domain:
        return None
    return graph.constant(producer.inputs[1])


def _ends_pair(node: ir.Node, zero: np.ndarray) -> bool:
    """Whether the node dequantizes with that zero point."""
    found = graph.constant(graph.input_at(node, 2))
    ends = node.op_type == "DequantizeLinear" and not node.domain
    return ends and found is not None and np.array_equal(found, zero)

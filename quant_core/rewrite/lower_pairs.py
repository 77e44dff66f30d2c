"""Pairs of quantization-aware training in the form that fuses on the target."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from quant_core.model import graph
from quant_core.plan.targets import Target

SHIFT = 128  # from int8 to uint8


def lower_pairs(model: ir.Model, target: Target) -> None:
    """Edit in place: int8 activations become uint8, where the target's kernels want that.

    1. The integers of a pair are shifted, which changes no value:

           QuantizeLinear(s, z: int8) -> DequantizeLinear(s, z)
         = QuantizeLinear(s, z + 128: uint8) -> DequantizeLinear(s, z + 128)

    2. Behind a Relu the negative half of a symmetric grid is empty. With zero point 0 instead of
       128 the Relu is part of the quantization, so that it fuses with the operator before it.
       Values that were clipped at the top of the grid no longer are.

    Pairs between which other nodes move the integers stay as they are.
    """
    if target.activation_signed or not target.is_onnxruntime:
        return
    shifted: dict[tuple[ir.Value, bool], ir.Value] = {}
    for inside in graph.graphs_of(model):
        for node in list(inside):
            if node.op_type == "QuantizeLinear" and not node.domain:
                _shift(model, node, shifted)


def _shift(
    model: ir.Model, quantize: ir.Node, shifted: dict[tuple[ir.Value, bool], ir.Value]
) -> None:
    """Edit in place: the pair whose first node this is."""
    if len(quantize.inputs) < 3 or graph.is_constant(quantize.inputs[0]):
        return
    old = graph.value(quantize.inputs[2])
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


def _ends_pair(node: ir.Node, zero: np.ndarray) -> bool:
    """Whether the node dequantizes with that zero point."""
    found = graph.constant(node.inputs[2]) if len(node.inputs) > 2 else None
    ends = node.op_type == "DequantizeLinear" and not node.domain
    return ends and found is not None and np.array_equal(found, zero)

"""Whether an input is a sound, by what the graph computes from it."""

from __future__ import annotations

import math

import onnx_ir as ir

from quant_core.data.reached import NORMALIZATIONS, PASSES_ON, reached
from quant_core.model import graph
from quant_core.model.constants import mean_of, tensor_of

# Linear operators, by which a spectrum is computed of its signal -> inputs, as in PASSES_ON.
LINEAR: dict[str, tuple[int, ...]] = PASSES_ON | dict.fromkeys(
    ("Conv", "MatMul", "Gemm", "Mul", "Pad", "Add", "Sub", "GatherND"), ()
)
# Operators between the squares of a spectrum and their logarithm.
TO_LOG: dict[str, tuple[int, ...]] = LINEAR | dict.fromkeys(
    ("ReduceSum", "ReduceMean", "Sum", "Sqrt", "Max", "Min", "Div"), ()
)
PRODUCTS = frozenset({"Conv", "MatMul", "Gemm"})
PERIOD = 64  # samples; at 16 kHz those of a low voice


def is_sound(source: ir.Value) -> bool:
    """Whether the input's spectrum is computed.

    1. input -> STFT
    2. input -> products with sines and cosines -> squares -> sums -> Log       or a DFT
    3. input -> products with sines and cosines -> sum of two squares           not of an image
    4. input -> Conv of one channel with a kernel as long as a period of it
    """
    nodes = {node for node, _, _ in reached([source], LINEAR)}
    if any(node.op_type == "STFT" for node in nodes):  # 1
        return True
    squares = [node.outputs[0] for node in nodes if _is_square(node) or node.op_type == "DFT"]
    if any(node.op_type == "Log" for node, _, _ in reached(squares, TO_LOG)):  # 2
        return True
    if source.shape is not None and len(source.shape) > 3:
        return False
    products = [node.outputs[0] for node in nodes if node.op_type in PRODUCTS]
    squared = {n.outputs[0] for n, _, _ in reached(products, LINEAR) if _is_square(n)}
    pairs = (node for square in squared for node in graph.consumers(square))
    if any(node.op_type == "Add" and set(node.inputs) <= squared for node in pairs):  # 3
        return True
    readers = reached([source], PASSES_ON | dict.fromkeys((*NORMALIZATIONS, "Pad"), (0,)))
    return any(_has_long_kernels(node) for node, position, _ in readers if position == 0)  # 4


def _has_long_kernels(node: ir.Node) -> bool:
    """Whether a node is a Conv along one axis of one channel, with kernels of PERIOD or more."""
    is_plain = node.op_type == "Conv" and graph.attribute(node, "group", 1) == 1
    weight = tensor_of(node.inputs[1]) if is_plain else None
    shape = () if weight is None else weight.shape.numpy()
    return len(shape) > 2 and shape[1] == 1 and max(shape[2:]) == math.prod(shape[2:]) >= PERIOD


def _is_square(node: ir.Node) -> bool:
    if node.op_type == "Pow":
        return mean_of(node.inputs[1]) == 2
    return node.op_type == "Mul" and node.inputs[0] is node.inputs[1]

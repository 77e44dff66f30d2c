"""Which axes of an operator's weight are output channels, and in which order the kernel adds the
others.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from quant_core.model import graph
from quant_core.numerics.layout import Layout

# Weights of a channel: with fewer, their scales would take more bytes than they save.
MIN_CARRIED_COLUMNS = 16
LayoutOf = Callable[[ir.Node, int], Layout]


def conv(node: ir.Node, rank: int) -> Layout:
    """(O, I / groups, kernel...): the input channel varies fastest."""
    return Layout((0, *range(2, rank), 1))


def transposed_conv(node: ir.Node, rank: int) -> Layout:
    """(I, O / groups, kernel...): each group has output channels of its own."""
    groups = int(graph.attribute(node, "group", 1))
    if groups == 1:
        return Layout((1, 0, *range(2, rank)))
    return Layout((0, 2, 1, *range(3, rank + 1)), channel_dims=2, groups=groups)


def matmul(node: ir.Node, rank: int) -> Layout:
    """(..., K, N): each matrix of a stack has output channels of its own.

    On the left of the product a weight is (..., C, K).
    """
    if is_left_weight(node):
        return Layout(tuple(range(rank)), channel_dims=rank - 1)
    return Layout((*range(rank - 2), rank - 1, rank - 2), channel_dims=rank - 1)


def gemm(node: ir.Node, rank: int) -> Layout:
    """(K, N) or, with transB, (N, K)."""
    return Layout((0, 1)) if graph.attribute(node, "transB", 0) else matmul(node, rank)


def carried(node: ir.Node, rank: int) -> Layout:
    """(..., K, N), as of a MatMul, or rows along the first axis where its matrices are small."""
    shape = graph.shape_of(graph.value(node.inputs[0]))
    if shape[-2] < MIN_CARRIED_COLUMNS:
        return Layout(tuple(range(rank)))
    return Layout((*range(rank - 2), rank - 1, rank - 2), channel_dims=rank - 1)


def recurrent(node: ir.Node, rank: int) -> Layout:
    """(directions, gates * hidden, K)."""
    return Layout((0, 1, 2), channel_dims=2)


def dynamic_lstm(node: ir.Node, rank: int) -> Layout:
    """(directions, K, 4 * hidden)."""
    return Layout((0, 2, 1), channel_dims=2)


def table(node: ir.Node, rank: int) -> Layout:
    """(rows, ..., width): each row is a channel."""
    return Layout(tuple(range(rank)), channel_dims=rank - 1)


def is_left_weight(node: ir.Node) -> bool:
    """Whether the node is the product of a constant and what is computed, in this order."""
    return (
        node.op_type == "MatMul"
        and len(node.inputs) == 2
        and graph.is_float_weight(node.inputs[0])
        and not graph.is_constant(node.inputs[1])
    )

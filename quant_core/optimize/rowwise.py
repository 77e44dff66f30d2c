"""Which inputs of an operator hold the rows that its rows are made of: op(x)[rows] = op(x[rows]).

A row is an index of one axis, which is counted from the front in every tensor.

Relu, Cast, Sigmoid, ...      the same row
Add, Mul, Where, ...          the same row of every operand that has more than one
MatMul, Gemm                  the same row of the first operand
Softmax, LayerNormalization   the same row, if they go along another axis
ReduceMean, ReduceMax, ...    the same row, if it is not reduced
Transpose, Reshape, ...       the row that moved there
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import TypeAlias

import onnx_ir as ir

from quant_core.model import graph
from quant_core.optimize.edit import axes_of
from quant_core.optimize.facts import Facts

Rows: TypeAlias = dict[int, int]  # position of an input -> axis of it that holds the rows


def rows_of(node: ir.Node, axis: int, facts: Facts) -> Rows | None:
    """The inputs that hold the rows of the node's only output, None if rows depend on others."""
    rank = facts.rank(node.outputs[0])
    known = RULES.get(node.op_type)
    if node.domain or len(node.outputs) != 1 or known is None or rank is None or axis >= rank:
        return None
    return known(node, axis, facts)


def _same(node: ir.Node, axis: int, facts: Facts) -> Rows | None:
    return {0: axis}


def _operands(node: ir.Node, axis: int, facts: Facts) -> Rows | None:
    """Every operand has as many rows as the result, or one that meets them all."""
    result = facts.dims(node.outputs[0])
    found = {}
    for position, value in enumerate(node.inputs):
        if value is None:
            continue
        dims = facts.dims(value)
        if dims is None or result is None:
            return None
        own = axis - (len(result) - len(dims))
        if own < 0 or dims[own] == 1:
            continue
        if dims[own] is None or dims[own] != result[axis]:
            return None
        found[position] = own
    return found


def _product(node: ir.Node, axis: int, facts: Facts) -> Rows | None:
    """The rows of the first matrix; of many matrices, those that meet one matrix for all."""
    left, right, result = (facts.rank(v) for v in (*node.inputs, node.outputs[0]))
    if left is None or right is None or result is None or left < 2 or right < 2:
        return None
    own = axis - (result - left)
    if axis == result - 1 or own < 0 or (axis < result - 2 and right > 2):
        return None
    return {0: own}


def _gemm(node: ir.Node, axis: int, facts: Facts) -> Rows | None:
    added = graph.input_at(node, 2)
    shape = (1,) if added is None else facts.shape(added)
    is_shared = shape is not None and (len(shape) < 2 or shape[0] == 1)
    return {0: 0} if axis == 0 and is_shared and not graph.attribute(node, "transA", 0) else None


def _along(node: ir.Node, axis: int, facts: Facts) -> Rows | None:
    rank = facts.rank(node.outputs[0])
    assert rank is not None
    return {0: axis} if graph.attribute(node, "axis", -1) % rank != axis else None


def _normalized(node: ir.Node, axis: int, facts: Facts) -> Rows | None:
    rank = facts.rank(node.outputs[0])
    assert rank is not None
    return {0: axis} if axis < graph.attribute(node, "axis", -1) % rank else None


def _reduced(node: ir.Node, axis: int, facts: Facts) -> Rows | None:
    rank, axes = facts.rank(node.inputs[0]), axes_of(node)
    if rank is None or not axes:
        return None
    gone = {a % rank for a in axes}
    if graph.attribute(node, "keepdims", 1):
        return {0: axis} if axis not in gone else None
    return {0: [a for a in range(rank) if a not in gone][axis]}


def _transposed(node: ir.Node, axis: int, facts: Facts) -> Rows | None:
    perm = graph.attribute(node, "perm", ())
    return {0: perm[axis]} if perm else None


def _unsqueezed(node: ir.Node, axis: int, facts: Facts) -> Rows | None:
    rank, axes = facts.rank(node.outputs[0]), axes_of(node)
    if rank is None or axes is None:
        return None
    new = {a % rank for a in axes}
    return {0: axis - sum(a < axis for a in new)} if axis not in new else None


def _squeezed(node: ir.Node, axis: int, facts: Facts) -> Rows | None:
    rank, axes = facts.rank(node.inputs[0]), axes_of(node)
    if rank is None or axes is None:
        return None
    gone = {a % rank for a in axes}
    return {0: [a for a in range(rank) if a not in gone][axis]}


def _reshaped(node: ir.Node, axis: int, facts: Facts) -> Rows | None:
    """The axis is where it was: those before it are as they were, and so is what one row holds."""
    target, before = graph.constant(node.inputs[1]), facts.dims(node.inputs[0])
    after = facts.dims(node.outputs[0])
    if target is None or before is None or after is None or axis >= len(before):
        return None
    if graph.attribute(node, "allowzero", 0):
        return None
    kept = [
        n == 0 or (b is not None and a == b) for n, b, a in zip(target, before, after, strict=False)
    ]
    row, new_row = (
        prod(n for n in dims[axis + 1 :] if isinstance(n, int)) for dims in (before, after)
    )
    is_open = any(not isinstance(n, int) for n in (*before[axis + 1 :], *after[axis + 1 :]))
    is_whole = row == new_row and not is_open
    return {0: axis} if all(kept[:axis]) and (kept[axis] or is_whole) else None


Rule: TypeAlias = Callable[[ir.Node, int, Facts], Rows | None]
ELEMENTWISE = (
    "Relu", "LeakyRelu", "Sigmoid", "Tanh", "Erf", "Gelu", "HardSigmoid", "HardSwish", "Mish",
    "Softplus", "Elu", "Selu", "Exp", "Log", "Sqrt", "Reciprocal", "Neg", "Abs", "Cast", "Not",
    "Clip", "Identity",
)  # fmt: skip
OPERANDS = (
    "Add", "Sub", "Mul", "Div", "Pow", "Where", "Max", "Min", "PRelu", "Equal", "Less", "Greater",
    "And", "Or",
)  # fmt: skip
REDUCED = ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL2", "ReduceSumSquare")
RULES: dict[str, Rule] = {
    **dict.fromkeys(ELEMENTWISE, _same),
    **dict.fromkeys(OPERANDS, _operands),
    **dict.fromkeys(REDUCED, _reduced),
    "MatMul": _product, "Gemm": _gemm,
    "Softmax": _along, "LogSoftmax": _along, "LayerNormalization": _normalized,
    "Transpose": _transposed, "Reshape": _reshaped,
    "Unsqueeze": _unsqueezed, "Squeeze": _squeezed,
}  # fmt: skip

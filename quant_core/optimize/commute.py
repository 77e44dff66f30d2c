"""Which operators an affine may pass: op(scale * x + shift) = scale' * op(x) + shift'.

Relu, LeakyRelu, PRelu           a positive scale, no shift
MaxPool, GlobalMaxPool           a positive scale; what is padded is smaller than anything
AveragePool, GlobalAveragePool   everything, a shift only if no padding is averaged
Resize (nearest, linear)         everything: its weights add up to one
Pad                              a scale if zeros are padded, everything if values of the tensor are
Mul, Div by a computed tensor    a scale
Concat, Split                    everything, cut to the parts
Transpose, Reshape, Slice, ...   everything: numbers only move
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from math import prod
from typing import TypeAlias

import numpy as np
import onnx_ir as ir

from quant_core.model import graph
from quant_core.optimize.affine import Affine
from quant_core.optimize.facts import Facts
from quant_core.optimize.fused import is_gelu
from quant_core.optimize.linear import has_pads

Found: TypeAlias = list[tuple[ir.Value, Affine]] | None
Condition: TypeAlias = Callable[[ir.Node, Affine], bool]


def downward(node: ir.Node, position: int, affine: Affine, facts: Facts) -> Found:
    """What happens to each output, if it no longer happens to the input at this position."""
    if node.domain:
        return None
    if node.op_type in ("Mul", "Div"):
        return _through_product(node, position, affine, facts)
    if node.op_type == "Concat":
        return _behind_concat(node, position, affine, facts)
    if node.op_type == "PRelu" and not graph.is_constant(node.inputs[1]):
        return None
    if position != 0 or not _allowed(node, affine):
        return None
    if node.op_type == "Split":
        return _behind_split(node, affine, facts)
    if len(node.outputs) != 1:
        return None
    moved = _moved(node, affine, facts, down=True)
    return None if moved is None else [(node.outputs[0], moved)]


def upward(node: ir.Node, affine: Affine, facts: Facts) -> list[Found]:
    """Ways to let it happen to inputs instead of to the node's only output."""
    if node.domain or len(node.outputs) != 1:
        return []
    if node.op_type in ("Mul", "Div"):
        return _before_product(node, affine, facts)
    if node.op_type == "Concat":
        return [_before_concat(node, affine, facts)]
    if not _allowed(node, affine) or node.op_type == "Split":
        return []
    moved = _moved(node, affine, facts, down=False)
    return [] if moved is None else [[(graph.value(node.inputs[0]), moved)]]


def _positive_scale(node: ir.Node, affine: Affine) -> bool:
    return not affine.shifts and bool((affine.scale > 0).all())


def _positive(node: ir.Node, affine: Affine) -> bool:
    return bool((affine.scale > 0).all())


def _averaged(node: ir.Node, affine: Affine) -> bool:
    return not affine.shifts or not has_pads(node)


def _interpolated(node: ir.Node, affine: Affine) -> bool:
    crops = graph.attribute(node, "coordinate_transformation_mode", "") == "tf_crop_and_resize"
    return graph.attribute(node, "mode", "nearest") in ("nearest", "linear") and not crops


def _padded(node: ir.Node, affine: Affine) -> bool:
    if graph.attribute(node, "mode", "constant") != "constant":
        return True
    filler = graph.input_at(node, 2)
    zero = filler is None or (graph.is_constant(filler) and not graph.array(filler).any())
    return zero and not affine.shifts


def _always(node: ir.Node, affine: Affine) -> bool:
    return True


# operator -> what it lets pass; which axis that is behind it, _moved says
CONDITIONS: dict[str, Condition] = {
    "Relu": _positive_scale, "LeakyRelu": _positive_scale, "PRelu": _positive_scale,
    "MaxPool": _positive, "GlobalMaxPool": _positive,
    "AveragePool": _averaged, "GlobalAveragePool": _always, "ReduceMean": _always,
    "Resize": _interpolated, "Pad": _padded,
    "Split": _always, "Transpose": _always, "Reshape": _always, "Flatten": _always,
    "Squeeze": _always, "Unsqueeze": _always, "Slice": _always, "Gather": _always,
    "Expand": _always, "Tile": _always,
    "Identity": _always, "DepthToSpace": _always, "SpaceToDepth": _always,
}  # fmt: skip
SAME_AXES = frozenset({"Relu", "LeakyRelu", "PRelu", "Identity"})
SAME_CHANNELS = frozenset({"MaxPool", "GlobalMaxPool", "AveragePool", "GlobalAveragePool"})
SAME_IF_SIZED = frozenset({"Resize", "Pad", "Slice"})  # an axis that keeps its size is left alone
RESHAPING = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze"})


def _allowed(node: ir.Node, affine: Affine) -> bool:
    condition = CONDITIONS.get(node.op_type)
    return condition is not None and condition(node, affine)


def _moved(node: ir.Node, affine: Affine, facts: Facts, *, down: bool) -> Affine | None:
    """The affine on the other side of an operator with one data input and one output."""
    axis = affine.axis
    if axis is None or node.op_type in SAME_AXES:
        return affine
    if node.op_type in SAME_CHANNELS:
        return affine if axis <= 1 else None
    data, output = graph.value(node.inputs[0]), node.outputs[0]
    if node.op_type in SAME_IF_SIZED:
        size = facts.size(data, axis)
        return affine if axis == 1 and size is not None and size == facts.size(output, 1) else None
    if node.op_type == "Transpose":
        perm = list(graph.attribute(node, "perm", ()))
        if not perm:
            return None
        return affine.along(perm.index(axis) if down else perm[axis])
    if node.op_type in RESHAPING:
        here, there = facts.shape(data), facts.shape(output)
        if here is None or there is None:
            return None
        return _reshaped(affine, here, there) if down else _reshaped(affine, there, here)
    return None


def _reshaped(
    affine: Affine, before: tuple[int | None, ...], after: tuple[int | None, ...]
) -> Affine | None:
    """The affine along the axis that its own became: the same, or one with the axes behind it.

    Sizes behind the first axis must be known, and of the same product: then the first is kept.
    """
    sizes, others = [n for n in before[1:] if n], [n for n in after[1:] if n]
    if len(sizes) != len(before) - 1 or len(others) != len(after) - 1:
        return None
    axis = affine.axis
    if not axis or not others or prod(sizes) != prod(others):
        return None
    ahead, channels = prod(sizes[: axis - 1]), affine.scale.size
    for position, size in enumerate(others):
        if prod(others[:position]) == ahead and size % channels == 0:
            behind = size // channels
            merged = [prod(sizes[axis:end]) for end in range(axis, len(sizes) + 1)]
            if behind in merged:
                scale, shift = np.repeat(affine.scale, behind), np.repeat(affine.shift, behind)
                return Affine.make(scale, shift, position + 1)
    return None


def _through_product(node: ir.Node, position: int, affine: Affine, facts: Facts) -> Found:
    """Mul and Div are linear in their first input, Mul in its second too."""
    if affine.shifts or (node.op_type == "Div" and position != 0) or is_gelu(node):
        return None
    if len({*node.inputs}) != 2:
        return None  # a square
    if affine.axis is None:
        return [(node.outputs[0], affine)]
    here, there = facts.rank(node.inputs[position]), facts.rank(node.outputs[0])
    if here is None or there is None:
        return None
    return [(node.outputs[0], affine.along(affine.axis + there - here))]


def _before_product(node: ir.Node, affine: Affine, facts: Facts) -> list[Found]:
    if affine.shifts or len({*node.inputs}) != 2 or is_gelu(node):
        return []
    ways: list[Found] = []
    for value in node.inputs[: 1 if node.op_type == "Div" else 2]:
        if value is None or graph.is_constant(value):
            continue
        if affine.axis is None:
            ways.append([(value, affine)])
            continue
        here, there = facts.rank(value), facts.rank(node.outputs[0])
        if here is not None and there is not None:
            axis = affine.axis + here - there
            if axis >= 0 and facts.size(value, axis) == affine.scale.size:
                ways.append([(value, affine.along(axis))])
    return ways


def _parts(values: list[ir.Value], axis: int, facts: Facts) -> list[int] | None:
    """Where the sizes along an axis begin, and the end of the last; None if one is unknown."""
    sizes = [facts.size(v, axis) for v in values]
    known = [n for n in sizes if n is not None]
    if len(known) != len(sizes):
        return None
    return [sum(known[:i]) for i in range(len(known) + 1)]


def _behind_concat(node: ir.Node, position: int, affine: Affine, facts: Facts) -> Found:
    """Only one part of the result changes: for the others the scale is 1 and the shift 0."""
    values = [graph.value(v) for v in node.inputs]
    rank = facts.rank(node.outputs[0])
    if rank is None:
        return None
    axis = graph.attribute(node, "axis", 0) % rank
    starts = _parts(values, axis, facts)
    if starts is None or affine.axis not in (None, axis):
        return None
    scale, shift = np.ones(starts[-1]), np.zeros(starts[-1])
    part = slice(starts[position], starts[position + 1])
    scale[part], shift[part] = affine.scale, affine.shift
    return [(node.outputs[0], Affine.make(scale, shift, axis))]


def _before_concat(node: ir.Node, affine: Affine, facts: Facts) -> Found:
    values = [graph.value(v) for v in node.inputs]
    rank = facts.rank(node.outputs[0])
    if any(graph.is_constant(v) for v in values) or rank is None:
        return None
    axis = graph.attribute(node, "axis", 0) % rank
    if affine.axis != axis:
        return [(v, affine) for v in values]
    starts = _parts(values, axis, facts)
    return None if starts is None else _cut(values, starts, affine)


def _behind_split(node: ir.Node, affine: Affine, facts: Facts) -> Found:
    rank = facts.rank(node.inputs[0])
    if affine.axis is None:
        return [(v, affine) for v in node.outputs]
    if rank is None:
        return None
    axis = graph.attribute(node, "axis", 0) % rank
    if affine.axis != axis:
        return [(v, affine) for v in node.outputs]
    starts = _parts(list(node.outputs), axis, facts)
    return None if starts is None else _cut(list(node.outputs), starts, affine)


def _cut(values: list[ir.Value], starts: list[int], affine: Affine) -> Found:
    """Each part with its share of the numbers."""
    if starts[-1] != affine.scale.size:
        return None
    parts = [slice(*ends) for ends in pairwise(starts)]
    return [
        (v, Affine.make(affine.scale[p], affine.shift[p], affine.axis))
        for v, p in zip(values, parts, strict=True)
    ]

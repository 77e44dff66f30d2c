"""Sizes of open input axes that the model itself fixes: a weight has them, they count steps, or
constants hold them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

import onnx_ir as ir

from quant_core.data.input_spec import InputSpec
from quant_core.model import graph
from quant_core.model.constants import is_given, numbers_of, size_of, tensor_of

ELEMENTWISE = frozenset({"Add", "Sub", "Mul", "Div"})
# Operators whose output has the axes of its input, and a constant operand does not change them.
SAME_AXES = ELEMENTWISE | {"Cast", "Identity", "OptionalGetElement", "Clip"}
# Which input axis each axis of a value is; None for one that the model adds.
Axes = tuple[int | None, ...]
STEPS = "steps"  # in place of the size of a first axis that is no batch
# Operator -> which axes of its first input are no batch.
STEP_AXES = {
    "Conv": slice(2, None),
    "MaxPool": slice(2, None),
    "AveragePool": slice(2, None),
    "LSTM": slice(0, 1),
    "GRU": slice(0, 1),
    "RNN": slice(0, 1),
}
# Operator -> axis of its first input whose size a weight has, and where: input and axis of that.
FIXED_SIZES = {
    "Conv": (1, 1, 1),  # times the number of groups
    "ConvTranspose": (1, 1, 0),
    "MatMul": (-1, 1, -2),
    "LSTM": (2, 1, 2),
    "GRU": (2, 1, 2),
    "RNN": (2, 1, 2),
    "BatchNormalization": (1, 1, 0),
    "InstanceNormalization": (1, 1, 0),
    "LayerNormalization": (-1, 1, -1),
}
# Operators whose constant operands are shapes, or parts of them, and others whose have sizes.
OF_SHAPES = frozenset({"Reshape", "Expand", "Concat", "Slice"})
OF_TABLES = ELEMENTWISE | {"Where", "Concat"}
MOST_AXES = 8
MOST_STEPS = 1 << 14
MOST_BAKED = 16  # sizes that are worth a try


def fixed_sizes(model: ir.Model, inputs: tuple[InputSpec, ...]) -> tuple[InputSpec, ...]:
    """The inputs, with the sizes of those open axes that weights fix, such as the channels.

    The symbol of a first axis that is no batch, as the model has one of its own before or behind
    it, says that it counts steps.
    """
    values = {str(value.name): value for value in model.graph.inputs}
    inputs = tuple(_with_axes(spec, values.get(spec.name)) for spec in inputs)
    found = {
        spec.name: _fixed_sizes(values[spec.name], len(spec.shape))
        for spec in inputs
        if spec.name in values and spec.shape
    }
    counted = {spec.shape[0] for spec in inputs if found.get(spec.name, {}).get(0) == STEPS}
    renamed = {symbol: f"{symbol} {STEPS}" for symbol in counted if isinstance(symbol, str)}

    def known(name: str, axis: int, size: int | str | None) -> int | str | None:
        if isinstance(size, int):
            return size
        fixed = found.get(name, {}).get(axis)
        if isinstance(fixed, int):
            return fixed
        return renamed.get(size, size) if size is not None else fixed

    return tuple(
        replace(spec, shape=tuple(known(spec.name, k, size) for k, size in enumerate(spec.shape)))
        for spec in inputs
    )


def baked_sizes(model: ir.Model) -> list[int]:
    """Sizes above 1 that constants of shapes, tables and positions hold, those that most of them
    hold first.

    Exporters that trace a model write so what was the size of an open axis.
    """
    counted: Counter[int] = Counter()
    for node in graph.nodes_of(model):
        for constant in filter(is_given, node.inputs):
            tensor = tensor_of(constant)
            if tensor is None:
                continue
            if node.op_type in OF_SHAPES and tensor.dtype.is_integer() and tensor.size <= MOST_AXES:
                counted.update(numbers_of(constant) or ())
            elif node.op_type in OF_TABLES and not tensor.dtype.is_integer():
                counted.update(tensor.shape.numpy()[1:-1])  # neither a batch nor channels
            elif node.op_type == "RotaryEmbedding" and tensor.dtype.is_integer():
                counted.update(tensor.shape.numpy()[1:])  # a position for each step
    sizes = (size for size, _ in counted.most_common() if 1 < size < MOST_STEPS)
    return list(islice(sizes, MOST_BAKED))


def _with_axes(spec: InputSpec, source: ir.Value | None) -> InputSpec:
    """The input; one of which the model does not say how many axes it has, with as many open ones
    as the first operator takes that reads it with a weight.
    """
    if source is None or source.shape is not None or spec.container:
        return spec
    waiting = [source]
    while waiting:
        value = waiting.pop()
        for node, position in ((use.node, use.idx) for use in value.uses()):
            if node.op_type in FIXED_SIZES and position == 0:
                return replace(spec, shape=(None,) * _axes_taken(node))
            if node.op_type in SAME_AXES:
                waiting.append(node.outputs[0])
    return spec


def _axes_taken(node: ir.Node) -> int:
    """How many axes the first input of an operator of FIXED_SIZES has: those of images, steps of
    sequences, or rows.
    """
    if node.op_type in graph.RECURRENT:
        return 3
    weight = graph.value(node.inputs[1])
    is_conv = node.op_type in ("Conv", "ConvTranspose")
    return len(weight.shape) if is_conv and weight.shape is not None else 2


def _fixed_sizes(source: ir.Value, rank: int) -> dict[int, int | str]:
    """Axis of the input -> its size, where an operator that reads it has a weight that says it;
    STEPS for a first axis that a window moves along, or a recurrent node.
    """
    sizes: dict[int, int | str] = {}
    waiting: list[tuple[ir.Value, Axes]] = [(source, tuple(range(rank)))]
    while waiting:
        value, axes = waiting.pop()
        for node, position in ((use.node, use.idx) for use in value.uses()):
            for axis, size in _sizes_that_fit(node, position, len(axes)):
                own_axis = axes[axis]
                if own_axis is not None:
                    sizes.setdefault(own_axis, size)
            steps = STEP_AXES.get(node.op_type, slice(0))
            if position == 0 and 0 in axes[steps]:
                sizes.setdefault(0, STEPS)
            output, behind = node.outputs[0], _axes_behind(node, value, axes)
            if behind is not None and (output.shape is None or len(output.shape) == len(behind)):
                waiting.append((output, behind))
    return sizes


def _sizes_that_fit(node: ir.Node, position: int, rank: int) -> Iterator[tuple[int, int]]:
    """(axis, its size) of a value of that rank that a node reads, where a weight says it."""
    if node.op_type in FIXED_SIZES and position == 0:
        axis, operand, weight_axis = FIXED_SIZES[node.op_type]
        size = size_of(node.inputs[operand], weight_axis)
        groups = int(graph.attribute(node, "group", 1)) if node.op_type == "Conv" else 1
        if isinstance(size, int) and -rank <= axis < rank:
            yield axis, size * groups
    lengths = numbers_of(node.inputs[1]) if node.op_type == "ReverseSequence" else None
    if lengths and position == 0:
        yield int(graph.attribute(node, "batch_axis", 1)), len(lengths)
        yield int(graph.attribute(node, "time_axis", 0)), max(lengths)
    if node.op_type in ELEMENTWISE and len(node.inputs) == 2:
        other = node.inputs[1 - position]
        for axis in range(-1, -rank, -1):  # the first may be the batch
            size = size_of(other, axis) if is_given(other) else None
            if isinstance(size, int) and size > 1:
                yield axis, size


def _padded_axes(pad: ir.Node, rank: int) -> set[int]:
    """The axes that a Pad makes longer; all but the second, of channels, where that is computed."""
    pads = graph.attribute(pad, "pads", None) or numbers_of(graph.input_at(pad, 1)) or ()
    if len(pads) != 2 * rank:
        return {k for k in range(rank) if k != 1}
    return {k for k in range(rank) if pads[k] or pads[rank + k]}


def _axes_behind(node: ir.Node, value: ir.Value, axes: Axes) -> Axes | None:
    """Which axis of an input each axis of a node's output is, None for new ones and for what is
    padded; None if the node is none of those that keep the others' sizes.

    value, axes  what the node reads, and which axis of the input each of its axes is
    """
    if node.op_type == "Pad":
        padded = _padded_axes(node, len(axes))
        return tuple(None if k in padded else axis for k, axis in enumerate(axes))
    if not all(is_given(other) for other in node.inputs if other is not value):
        return None
    if node.op_type in SAME_AXES:
        return axes
    if node.op_type == "Transpose":
        order = graph.attribute(node, "perm", range(len(axes))[::-1])
        return tuple(axes[axis] for axis in order)
    if node.op_type not in ("Unsqueeze", "Squeeze"):
        return None
    listed = graph.attribute(node, "axes", None)
    if listed is None and len(node.inputs) > 1:
        listed = numbers_of(node.inputs[1])
    if listed is None:
        return None
    rank = len(axes) + (len(listed) if node.op_type == "Unsqueeze" else 0)
    changed = {int(axis) % rank for axis in listed}
    if node.op_type == "Squeeze":
        return tuple(axis for k, axis in enumerate(axes) if k not in changed)
    kept = iter(axes)
    return tuple(None if k in changed else next(kept) for k in range(rank))

"""Open sizes that are equal get one name, so that onnxruntime knows it too."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

import onnx_ir as ir

from quant_core.model import graph
from quant_core.optimize.applied import Applied
from quant_core.optimize.facts import Facts

Size: TypeAlias = int | str
Sizes: TypeAlias = list[Size]

SAME = frozenset(
    {"Relu", "LeakyRelu", "PRelu", "Sigmoid", "Tanh", "HardSigmoid", "HardSwish", "Clip",
     "Identity", "BatchNormalization", "Softmax"}
)  # fmt: skip
POOLS = frozenset({"MaxPool", "AveragePool"})
PAIRS = frozenset({"Add", "Sub", "Mul", "Div"})


def named_sizes(model: ir.Model, facts: Facts) -> list[Applied]:
    """Sums of images whose sizes are open, but equal whatever the input.

        x(n, c, ?, ?) -> Conv(3 x 3, pads 1) -> z(n, c, ?, ?);  Add(x, z)
        =>   x(n, c, h, w), z(n, c, h, w)

    1. Sizes are followed from operator to operator: a Conv that pads as much as its kernel takes
       keeps them, two that step alike make the same of the same.
    2. No node changes: both operands of the sum are said to have these sizes. onnxruntime adds
       inside the Conv, in its blocked layout, what it knows to be of one size; it loses track of
       sizes wherever a tensor leaves that layout.
    """
    names = _Names(facts, set())
    names.taken.update(str(n) for dims in facts.known.values() for n in dims if isinstance(n, str))
    for node in model.graph:
        names.follow(node)
    applied = []
    for node in model.graph:
        if node.op_type == "Add" and not node.domain and names.is_news(node):
            applied.append(Applied("named_sizes", str(node.name), ()))
            for value in graph.computed_inputs(node):
                value.shape = ir.Shape(names.sizes[value])
                value.type = ir.TensorType(facts.types[str(value.name)])
    return applied


@dataclass(slots=True)
class _Names:
    """Sizes of tensors so far, and the name of what each operator makes of an open one."""

    facts: Facts
    taken: set[str]
    sizes: dict[ir.Value, Sizes] = field(default_factory=dict)
    made: dict[tuple[object, ...], str] = field(default_factory=dict)

    def of(self, value: ir.Value | None) -> Sizes | None:
        """The sizes of a tensor, with a new name for each open one; None if its rank is unknown."""
        if value is None:
            return None
        if value not in self.sizes:
            dims = self.facts.dims(value)
            if dims is None:
                return None
            own = value.is_graph_input()
            found = [
                n if isinstance(n, int) or (own and n is not None) else self.name(value.name, i)
                for i, n in enumerate(dims)
            ]
            if own or graph.is_constant(value):
                return found
            self.sizes[value] = found
        return self.sizes[value]

    def name(self, *key: object) -> str:
        """The name of what is made in this way, the same for the same key."""
        if key not in self.made:
            number = len(self.made)
            while f"s{number}" in self.taken:
                number += 1
            self.made[key] = f"s{number}"
            self.taken.add(self.made[key])
        return self.made[key]

    def follow(self, node: ir.Node) -> None:
        """The sizes of the node's result, where they follow from those of its data."""
        data = self.of(node.inputs[0]) if node.inputs else None
        if data is None or node.domain:
            return
        output = node.outputs[0]
        if node.op_type in SAME:
            self.sizes[output] = list(data)
        elif node.op_type in PAIRS:
            other = self.of(node.inputs[1])
            if other is not None:
                self.sizes[output] = self._broadcast(data, other)
        elif node.op_type == "Conv" and len(data) == 4:
            if graph.is_constant(node.inputs[1]):
                channels = graph.shape_of(graph.value(node.inputs[1]))[0]
                self.sizes[output] = [data[0], channels, *self._windows(node, data)]
        elif node.op_type in POOLS and len(data) == 4:
            self.sizes[output] = [*data[:2], *self._windows(node, data)]
        elif node.op_type in ("GlobalAveragePool", "GlobalMaxPool"):
            self.sizes[output] = [*data[:2], *[1] * (len(data) - 2)]
        elif node.op_type in ("Reshape", "Gemm"):
            self._copy_rows(data, output)

    def _copy_rows(self, data: Sizes, output: ir.Value) -> None:
        """The first axis goes through where ONNX knows that it does; others are known or new."""
        producer = output.producer()
        before = None if producer is None else self.facts.dims(producer.inputs[0])
        after, found = self.facts.dims(output), self.of(output)
        if found and before and after and before[0] is not None and before[0] == after[0]:
            found[0] = data[0]

    def _broadcast(self, one: Sizes, other: Sizes) -> Sizes:
        rank = max(len(one), len(other))
        ones: Sizes = [1] * rank
        left, right = (ones[len(sizes) :] + sizes for sizes in (one, other))
        return [self._wider(a, b) for a, b in zip(left, right, strict=True)]

    def _wider(self, a: Size, b: Size) -> Size:
        if a == b or b == 1:
            return a
        if a == 1 or isinstance(b, int):
            return b
        return a if isinstance(a, int) else self.name("wider", *sorted((a, b)))

    def _windows(self, node: ir.Node, data: Sizes) -> Sizes:
        """The sizes along both image axes behind a Conv or a pool."""
        return [self._window(node, data, axis) for axis in (0, 1)]

    def _window(self, node: ir.Node, data: Sizes, axis: int) -> Size:
        """The size along one image axis behind a Conv or a pool."""
        if node.op_type == "Conv":
            kernel = graph.shape_of(graph.value(node.inputs[1]))[2 + axis]
        else:
            kernel = graph.attribute(node, "kernel_shape", (1, 1))[axis]
        stride = graph.attribute(node, "strides", (1, 1))[axis]
        dilation = graph.attribute(node, "dilations", (1, 1))[axis]
        pads = graph.attribute(node, "pads", (0, 0, 0, 0))
        way = graph.attribute(node, "auto_pad", "NOTSET")
        grows = pads[axis] + pads[axis + 2] - (kernel - 1) * dilation
        size = data[2 + axis]
        if way in ("SAME_UPPER", "SAME_LOWER"):
            grows = 0
        rounds = graph.attribute(node, "ceil_mode", 0)
        if stride == 1 and grows == 0:
            return size
        key = (size, stride, grows, rounds, way)
        known = self.facts.size(node.outputs[0], 2 + axis)
        return known if known is not None else self.name(*key)

    def is_news(self, node: ir.Node) -> bool:
        """Whether the node's two computed operands have one size, and the model does not say so."""
        values = graph.computed_inputs(node)
        if len(values) != 2 or values[0] is values[1]:
            return False
        if any(v.is_graph_output() or str(v.name) not in self.facts.types for v in values):
            return False
        one, other = (self.sizes.get(v) for v in values)
        if one is None or one != other or len(one) != 4:
            return False
        is_open = any(isinstance(n, str) for n in one[2:])
        return is_open and any(_said(v) != one for v in values)


def _said(value: ir.Value) -> list[object]:
    """The sizes that the model has for a tensor."""
    if value.shape is None:
        return []
    return [n if isinstance(n, int) else n.value for n in value.shape]

"""Channels that are the same number everywhere, or that nobody reads, are cut out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeGuard

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quant_core.model import graph
from quant_core.optimize import linear
from quant_core.optimize.affine import Numbers
from quant_core.optimize.applied import Applied
from quant_core.optimize.edit import is_float32, numbers, replace_constant
from quant_core.optimize.facts import Facts

# Axes of a weight of one group: (outputs, inputs).
AXES = {"Conv": (0, 1), "ConvTranspose": (1, 0), "Gemm": (1, 0), "MatMul": (1, 0)}
# Operators that compute each element alone: what they make of a number.
UNARY: dict[str, Callable[[Numbers, ir.Node], Numbers]] = {
    "Identity": lambda x, _: x,
    "Relu": lambda x, _: np.maximum(x, 0),
    "LeakyRelu": lambda x, n: np.where(x < 0, graph.attribute(n, "alpha", 0.01) * x, x),
    "Neg": lambda x, _: -x,
    "Abs": lambda x, _: np.abs(x),
    "Tanh": lambda x, _: np.tanh(x),
    "Sigmoid": lambda x, _: 1 / (1 + np.exp(-x)),
}
# Operators that compute each channel alone; so does Flatten, of channels of one number each.
POOLS = frozenset({"MaxPool", "GlobalMaxPool", "GlobalAveragePool", "AveragePool"})
PAIRS: dict[str, Callable[[Numbers, Numbers], Numbers]] = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
}


def zero_channels(model: ir.Model, facts: Facts) -> list[Applied]:
    """Structured sparsity becomes smaller weights.

        Conv(W[c] = 0, b) -> Relu -> Conv(V)   =>   Conv(W without c) -> Relu -> Conv(V without c)

    1. Tensors that share their channels belong together: those between linear operators, which
       operators that treat each channel alone connect, sums of two tensors and depthwise Convs
       among them. No other operator, branch or output of a graph may see one of them.
    2. A channel whose weights are 0 is its bias everywhere, and then what the operators make of
       that number.
    3. It can be cut out if every linear reader either has no weight for it, or can take the number
       into its bias: if that is 0, or if the reader does not pad.
    4. One channel stays at least.
    """
    applied = []
    done: set[ir.Value] = set()
    for node in graph.nodes_of(model):
        if _weight(node) is None or node.outputs[0] in done:
            continue
        shared = _Shared(graph.home(node), facts, _channel_axis(node))
        if not shared.collect(node.outputs[0]):  # 1.
            continue
        done.update(shared.values)
        cut = shared.cuttable()
        if cut.any():
            shared.cut(cut)
            applied.append(Applied("zero_channels", str(node.name), ()))
    return applied


@dataclass(slots=True)
class _Shared:
    """Tensors that share their channels, and the nodes around them.

    axis     of the channels: 1, or -1 for the last
    values   tensor -> the number that fills each channel, NaN where there is none; None: not known
    writers  linear nodes that write one of the tensors
    between  nodes that treat each channel alone
    readers  (linear node, tensor that it reads)
    """

    inside: ir.Graph
    facts: Facts
    axis: int
    values: dict[ir.Value, Numbers | None] = field(default_factory=dict)
    writers: list[ir.Node] = field(default_factory=list)
    between: list[ir.Node] = field(default_factory=list)
    readers: list[tuple[ir.Node, ir.Value]] = field(default_factory=list)
    channels: int = 0

    def collect(self, first: ir.Value) -> bool:
        """Whether the tensors that share the channels of the first are known, and all around."""
        waiting = [first]
        while waiting:
            value = waiting.pop()
            if value in self.values:
                continue
            self.values[value] = None
            producer = value.producer()
            if producer is None or value.is_graph_output() or not self._fits(value):
                return False
            for node in (producer, *(use.node for use in value.uses())):
                alike = self._collect_node(node, value)
                if alike is None:
                    return False
                waiting += alike
        return True

    def _collect_node(self, node: ir.Node, value: ir.Value) -> list[ir.Value] | None:
        """What else shares the channels of the tensor beside this node; None if the node needs all
        of them.
        """
        if node.graph is not self.inside or node.domain or len(node.outputs) != 1:
            return None
        if _weight(node) is not None:
            return [] if self._takes(node, value) else None
        if not self._is_between(node):
            return None
        if node not in self.between:
            self.between.append(node)
        return [v for v in (*node.inputs, *node.outputs) if _is_data(v)]

    def cuttable(self) -> NDArray[np.bool_]:
        """(C,): which channels can be cut out (2. and 3.)."""
        found = np.ones(self.channels, bool)
        for node, value in self.readers:
            filled = self.number(value)
            weight = numbers(graph.value(node.inputs[linear.WEIGHT]))
            own = np.moveaxis(weight, _axes(node)[1], 0).reshape(self.channels, -1)
            takes = filled == 0 if _is_fixed(node) else ~np.isnan(filled)
            found &= ~own.any(1) | takes
        if found.all():
            found[0] = False  # 4.
        return found

    def number(self, value: ir.Value) -> Numbers:
        """(C,): the number that fills each channel, NaN where none does."""
        known = self.values[value]
        if known is None:
            producer = value.producer()
            assert producer is not None
            with np.errstate(all="ignore"):
                known = self.values[value] = self._filled(producer)
        return known

    def cut(self, cut: NDArray[np.bool_]) -> None:
        """Edit in place: the channels are gone."""
        kept = np.flatnonzero(~cut)
        for node, value in self.readers:
            self._take_numbers(node, np.where(cut, np.nan_to_num(self.number(value)), 0.0))
            _keep(node, linear.WEIGHT, _axes(node)[1], kept)
        for node in self.writers:
            _keep(node, linear.WEIGHT, _axes(node)[0], kept)
            self._keep_vector(node, linear.BIAS, kept)
        for node in self.between:
            if node.op_type == "Conv":
                _keep(node, linear.WEIGHT, 0, kept)
                node.attributes["group"] = ir.AttrInt64("group", len(kept))
            for position in range(1 if node.op_type not in PAIRS else 0, len(node.inputs)):
                if node.op_type != "Conv" or position == linear.BIAS:
                    self._keep_vector(node, position, kept)
        for value in self.values:
            value.shape = None

    def _fits(self, value: ir.Value) -> bool:
        """Whether the tensor has as many channels as the others."""
        size = self.facts.size(value, self.axis)
        self.channels = self.channels or size or 0
        return size is not None and size == self.channels

    def _takes(self, node: ir.Node, value: ir.Value) -> bool:
        """Whether a linear node writes or reads the tensor's channels; it is noted as one."""
        rank = self.facts.rank(value)
        if rank is None or _channel_axis(node) % rank != self.axis % rank:
            return False
        if node.outputs[0] is value:
            self.writers.append(node)
            return linear.bias_of(node) is not None
        self.readers.append((node, value))
        return [i for i, v in enumerate(node.inputs) if v is value] == [0]

    def _is_between(self, node: ir.Node) -> bool:
        if node.op_type in UNARY:
            return True
        if node.op_type in POOLS or node.op_type == "Flatten":
            return self.axis == 1
        if node.op_type in PAIRS:
            shape = self.facts.dims(node.outputs[0])
            data = graph.computed_inputs(node)
            return all(self.facts.dims(v) == shape for v in data) and all(
                self._is_vector(v, node) for v in node.inputs if not _is_data(v)
            )
        if node.op_type == "Conv":
            weight = node.inputs[linear.WEIGHT]
            bias = graph.input_at(node, linear.BIAS)
            is_depthwise = graph.attribute(node, "group", 1) == self.channels > 1
            return (
                is_depthwise
                and _is_own(weight)
                and graph.shape_of(graph.value(weight))[0] == self.channels
                and (bias is None or is_float32(bias))
            )
        return False

    def _is_vector(self, value: ir.Value | None, node: ir.Node) -> bool:
        """Whether a constant is one number, or one for each channel."""
        if not is_float32(value):
            return False
        shape, rank = graph.shape_of(graph.value(value)), self.facts.rank(node.outputs[0])
        if rank is None or len(shape) > rank:
            return False
        axis = self.axis % rank - (rank - len(shape))
        others = [n for i, n in enumerate(shape) if i != axis]
        return all(n == 1 for n in others) and (axis < 0 or shape[axis] in (1, self.channels))

    def _vector(self, value: ir.Value) -> Numbers:
        return np.broadcast_to(numbers(value).reshape(-1), self.channels)

    def _keep_vector(self, node: ir.Node, position: int, kept: NDArray[np.intp]) -> None:
        """Edit in place: a constant with a number for each channel has those that stay."""
        value = graph.input_at(node, position)
        if value is None or _is_data(value):
            return
        shape = graph.shape_of(value)
        axes = [axis for axis, size in enumerate(shape) if size == self.channels > 1]
        if axes:
            array = np.take(numbers(value), kept, axes[0])
            linear.set_constant(node, position, array)

    def _filled(self, node: ir.Node) -> Numbers:
        """(C,): what fills each channel of the node's output (2.)."""
        nothing = np.full(self.channels, np.nan)
        if node in self.writers:
            bias = linear.bias_of(node)
            weight = numbers(graph.value(node.inputs[linear.WEIGHT]))
            rows = np.moveaxis(weight, _axes(node)[0], 0).reshape(self.channels, -1)
            return nothing if bias is None else np.where(rows.any(1), np.nan, bias)
        data = graph.computed_inputs(node)
        if node.op_type in UNARY:
            return UNARY[node.op_type](self.number(data[0]), node)
        if node.op_type in PAIRS:
            both = [self.number(v) if _is_data(v) else self._vector(graph.value(v))
                    for v in node.inputs]  # fmt: skip
            made = PAIRS[node.op_type](*both)
            if node.op_type == "Mul":
                made = np.where((both[0] == 0) | (both[1] == 0), 0.0, made)
            return made
        before = self.number(data[0])
        is_plain = node.op_type != "AveragePool" or not linear.has_pads(node)
        if node.op_type in POOLS or node.op_type == "Flatten":
            return before if is_plain else np.where(before == 0, 0.0, np.nan)
        weight = numbers(graph.value(node.inputs[linear.WEIGHT]))
        added = graph.input_at(node, linear.BIAS)
        shift = np.zeros(self.channels) if added is None else self._vector(added)
        weight = weight.reshape(self.channels, -1)
        made = before * weight.sum(1) + shift
        if linear.is_padded(node):
            made = np.where(before == 0, shift, np.nan)
        return np.where(weight.any(1), made, shift)

    def _take_numbers(self, node: ir.Node, filled: Numbers) -> None:
        """Edit in place: a reader adds to its bias what it made of the channels' numbers."""
        weight = numbers(graph.value(node.inputs[linear.WEIGHT]))
        output, source = _axes(node)
        by_output = np.moveaxis(weight, (output, source), (0, 1))
        by_output = by_output.reshape(*by_output.shape[:2], -1).sum(2)
        added = graph.attribute(node, "alpha", 1.0) * (by_output @ filled)
        if added.any():
            bias = linear.bias_of(node)
            assert bias is not None
            linear.set_bias(node, bias + added)


def _channel_axis(node: ir.Node) -> int:
    """The axis of channels in what a linear node reads and writes, -1 for the last."""
    return 1 if node.op_type in ("Conv", "ConvTranspose") else -1


def _axes(node: ir.Node) -> tuple[int, int]:
    """The axes of outputs and inputs of a linear node's weight."""
    output, source = AXES[node.op_type]
    is_turned = node.op_type == "Gemm" and graph.attribute(node, "transB", 0)
    return (source, output) if is_turned else (output, source)


def _weight(node: ir.Node) -> ir.Value | None:
    """The weight of a linear node of one group, which only this node reads."""
    if node.op_type not in AXES or linear.layout(node) is None:
        return None
    return node.inputs[linear.WEIGHT] if graph.attribute(node, "group", 1) == 1 else None


def _is_fixed(node: ir.Node) -> bool:
    """Whether a reader cannot take a number into its bias."""
    if node.op_type in ("MatMul", "ConvTranspose") or linear.bias_of(node) is None:
        return True
    return node.op_type == "Conv" and linear.is_padded(node)


def _is_own(value: ir.Value | None) -> bool:
    """Whether the value is a float32 constant that one node reads, once."""
    return value is not None and is_float32(value) and len(value.uses()) == 1


def _is_data(value: ir.Value | None) -> TypeGuard[ir.Value]:
    return value is not None and not graph.is_constant(value)


def _keep(node: ir.Node, position: int, axis: int, kept: NDArray[np.intp]) -> None:
    """Edit in place: of a weight these slices stay."""
    weight = graph.value(node.inputs[position])
    replace_constant(weight, np.take(numbers(weight), kept, axis))

"""Pixels that nobody reads are not computed: strides move before what makes them all."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

import onnx_ir as ir

from quant_core.model import graph
from quant_core.optimize.applied import Applied
from quant_core.optimize.edit import bypass, put_before, read_here
from quant_core.optimize.facts import Facts
from quant_core.optimize.rowwise import rows_of

WINDOWS = frozenset({"Conv", "MaxPool", "AveragePool"})

Strides: TypeAlias = tuple[int, ...]  # one for each image axis


@dataclass(frozen=True, slots=True)
class Operand:
    """An input of a node, of which only every so many pixels matter."""

    node: ir.Node
    position: int
    strides: Strides

    @property
    def value(self) -> ir.Value:
        return graph.value(self.node.inputs[self.position])


@dataclass(frozen=True, slots=True)
class Makers:
    """What makes the pixels of a tensor.

    windows  Convs and pools, and by what their strides are multiplied
    between  the operators behind them, which work pixel by pixel
    picked   operands of these that are not made for them alone
    """

    windows: list[tuple[ir.Node, Strides]] = field(default_factory=list)
    between: list[ir.Node] = field(default_factory=list)
    picked: list[Operand] = field(default_factory=list)


def unread_pixels(model: ir.Model, facts: Facts) -> list[Applied]:
    """Strides of Convs that look at single pixels move to the Conv that makes these pixels.

        x -> Conv 3x3 -> Add(z) -> Relu -> Convs 1x1, strides 2
        =>   x -> Conv 3x3, strides 2 -> Add(MaxPool 1x1, strides 2 of z) -> Relu -> Convs 1x1

    1. All readers of a tensor are Convs or pools of one pixel, without padding, and step alike.
    2. Their strides pass operators that make each pixel of the same pixel of their operands
       (rowwise.py), and end at a Conv or pool with a window of any size.
    3. An operand that others read too, or that something else makes, is picked by a pool of one
       pixel; pools read floats alone.
    4. At least one Conv takes strides: it computes a part of its pixels, and so does all behind it.
    """
    applied = []
    for inside in graph.graphs_of(model):
        for value in [v for node in inside for v in node.outputs]:
            strides = _common_strides(value, inside)  # 1.
            if strides is None:
                continue
            makers = _makers(value, strides, facts)
            convs = [node for node, _ in makers.windows if node.op_type == "Conv"]
            if convs and all(facts.holds_float32(o.value) for o in makers.picked):  # 3., 4.
                _move(value, makers)
                applied += [Applied("unread_pixels", str(node.name), ()) for node in convs]
    return applied


def _common_strides(value: ir.Value, inside: ir.Graph) -> Strides | None:
    """The strides with which all readers pick pixels of the value, None if one reads others."""
    readers = graph.consumers(value)
    if not read_here(value, inside) or any(use.idx for use in value.uses()):
        return None
    found = {_strides_of_pixel(node) for node in readers}
    return found.pop() if len(found) == 1 else None


def _strides_of_pixel(node: ir.Node) -> Strides | None:
    """The strides of a Conv or pool that sees one pixel at a time, None if they are 1, or it sees
    more.
    """
    if not _is_window(node):
        return None
    if node.op_type == "Conv":
        taps = tuple((graph.value(node.inputs[1]).shape or ())[2:])
    else:
        taps = graph.attribute(node, "kernel_shape", ())
    is_pixel = bool(taps) and all(n == 1 for n in taps)
    if not is_pixel or any(graph.attribute(node, "pads", ())):
        return None
    strides = tuple(graph.attribute(node, "strides", ()))
    return strides if any(s > 1 for s in strides) else None


def _is_window(node: ir.Node) -> bool:
    """Whether the node is a Conv or pool whose padding does not depend on its strides."""
    return (
        node.op_type in WINDOWS
        and not node.domain
        and graph.attribute(node, "auto_pad", "NOTSET") in ("NOTSET", "VALID")
        and not graph.attribute(node, "ceil_mode", 0)
        and not any(v.uses() or v.is_graph_output() for v in node.outputs[1:])
    )


def _makers(value: ir.Value, strides: Strides, facts: Facts) -> Makers:
    """What makes these pixels of the value (2., 3.)."""
    found = Makers()
    waiting: list[Operand | None] = [None]
    while waiting:
        operand = waiting.pop()
        if operand is not None:
            value, strides = operand.value, operand.strides
        maker = value.producer()
        is_alone = operand is None or graph.only_reader(value) is operand.node
        if maker is not None and is_alone and _is_window(maker):
            found.windows.append((maker, strides))
            continue
        operands = _operands(maker, strides, facts) if maker is not None and is_alone else []
        if operands and maker is not None:
            found.between.append(maker)
            waiting += operands
        elif operand is not None:
            found.picked.append(operand)
    return found


def _operands(node: ir.Node, strides: Strides, facts: Facts) -> list[Operand]:
    """The operands of a node that works pixel by pixel, with what of them matters; none if it does
    not work so.
    """
    found: dict[int, list[int]] = {}
    for axis, stride in enumerate(strides, 2):
        rows = {} if stride == 1 else rows_of(node, axis, facts)
        if rows is None or node.op_type == "Reshape":
            return []  # a Reshape names the sizes of its result
        for position, own in rows.items():
            if own != axis or graph.is_constant(node.inputs[position]):
                return []
            found.setdefault(position, [1] * len(strides))[axis - 2] = stride
    return [Operand(node, position, tuple(own)) for position, own in found.items()]


def _move(value: ir.Value, makers: Makers) -> None:
    """Edit in place: what makes the value makes only the pixels that are read."""
    for node, strides in makers.windows:
        own = graph.attribute(node, "strides", (1,) * len(strides))
        _set_strides(node, tuple(a * b for a, b in zip(own, strides, strict=True)))
    for node in (*(node for node, _ in makers.windows), *makers.between):
        node.outputs[0].shape = None
    for operand in makers.picked:
        operand.node.replace_input_with(operand.position, _picked(operand))
    for reader in graph.consumers(value):
        _set_strides(reader, (1,) * len(graph.attribute(reader, "strides", ())))
        if reader.op_type != "Conv" and not reader.outputs[0].is_graph_output():
            bypass(reader.outputs[0], value)  # a pool that has become an identity


def _set_strides(node: ir.Node, strides: Strides) -> None:
    node.attributes["strides"] = ir.AttrInt64s("strides", strides)


def _picked(operand: Operand) -> ir.Value:
    """The pixels that matter, by a new node before the one that reads them."""
    attributes = [
        ir.AttrInt64s("kernel_shape", (1,) * len(operand.strides)),
        ir.AttrInt64s("strides", operand.strides),
    ]
    pool = ir.Node("", "MaxPool", [operand.value], attributes)
    picked = put_before(operand.node, pool, f"{operand.value.name}_picked")
    picked.type = operand.value.type
    return picked

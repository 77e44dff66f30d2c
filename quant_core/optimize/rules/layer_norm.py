"""Normalizations in the form that onnxruntime computes as one operator."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from quant_core.model import graph
from quant_core.optimize.affine import affine_of
from quant_core.optimize.applied import Applied, Chosen
from quant_core.optimize.chains import Chain, chains
from quant_core.optimize.edit import axes_of, constant, put_in_place, transpose
from quant_core.optimize.facts import Facts

OPSET = 17  # the first with LayerNormalization


def layer_norm(model: ir.Model, facts: Facts) -> list[Applied]:
    """Rows less their mean over their deviation, or rows over their root mean square, whichever way
    that is written.

        d = x - ReduceMean(x)
        d / Sqrt(ReduceMean(d * d) + e) [* g] [+ b]       =>   LayerNormalization(x, g, b)

        x * Reciprocal(Sqrt(ReduceMean(x * x) + e)) * g   =>   x / Sqrt(ReduceMean(x^2) + e) * g

    1. Both means are over the last axis alone, which is kept.
    2. The square is a Pow or a Mul; the quotient a Div, or a Mul by a Reciprocal or by 1 / s.
    3. g and b are one number or one per column. Without g a LayerNormalization gets ones, for which
       the number of columns must be known.
    4. Nothing else reads what is between.
    5. A root mean square is written as onnxruntime merges it: with a Pow and a Div, and a g.

    onnxruntime merges the first only where the square is a Pow and both g and b are there.

    Source: Ba, Kiros and Hinton 2016, "Layer Normalization", arXiv 1607.06450, section 3; Zhang and
    Sennrich 2019, "Root Mean Square Layer Normalization", arXiv 1910.07467, section 4.
    """
    has_operator = graph.opset(model) >= OPSET
    applied = []
    for found, chain in _quotients(model, facts):
        if not found.is_of_rows:
            continue
        norm = _layer_norm_of(found, facts) if has_operator else None
        if norm is not None:
            applied.append(_write(norm, chain))
        elif _needs_other_form(found, chain, facts):
            applied.append(_reform(found))
    return applied


def inner_layer_norm(model: ir.Model, facts: Facts, chosen: Chosen) -> list[Applied]:
    """A normalization over an axis that is not the last, as over the channels of images in ConvNeXt
    and in SAM, with that axis moved to the end and back.

        d = x - ReduceMean(x, axis = i)
        d / Sqrt(ReduceMean(d * d, axis = i) + e) [* g] [+ b]
            =>   Transpose(i to the end) -> LayerNormalization -> Transpose(the end to i)

    What `layer_norm` asks for under 2 to 4 holds here too.

    Source: Liu et al. 2022, "A ConvNet for the 2020s", arXiv 2201.03545, section 2.6.
    """
    applied: list[Applied] = []
    if graph.opset(model) < OPSET:
        return applied
    for found, chain in _quotients(model, facts):
        is_chosen = chosen(str(found.quotient[-1].name))
        norm = None if found.is_of_rows or not is_chosen else _layer_norm_of(found, facts)
        if norm is not None:
            applied.append(_write(norm, chain))
    return applied


def _quotients(model: ir.Model, facts: Facts) -> Iterator[tuple[Quotient, Chain | None]]:
    """The quotients by a root mean square, with the affine chain behind each that alone reads it;
    the model may be edited meanwhile.
    """
    behind = {
        chain.source: chain
        for chain in chains(model, facts)
        if graph.only_reader(chain.source) is chain.nodes[0]
    }
    for root in graph.nodes_of(model, "Sqrt"):
        found = _read(root, facts)
        if found is not None:
            yield found, behind.get(found.quotient[-1].outputs[0])


@dataclass(frozen=True, slots=True)
class Quotient:
    """Values over the root of their mean square.

    axis      of the mean, counted from the front
    rank      how many axes the values have
    nodes     that make the root of the values: their square first, the Sqrt last
    quotient  that divide by it, the last last
    """

    values: ir.Value
    axis: int
    rank: int
    epsilon: float
    nodes: tuple[ir.Node, ...]
    quotient: tuple[ir.Node, ...]

    @property
    def is_of_rows(self) -> bool:
        return self.axis == self.rank - 1


@dataclass(frozen=True, slots=True)
class Norm:
    """A quotient whose values are what is normalized less its mean.

    size   how many numbers there are along the axis
    nodes  that do it all, the last last
    """

    x: ir.Value
    size: int
    quotient: Quotient
    nodes: tuple[ir.Node, ...]


def _read(root: ir.Node, facts: Facts) -> Quotient | None:
    """The quotient by this root, None if it is another."""
    added = graph.value(root.inputs[0]).producer()
    read = None if added is None else affine_of(added, facts)
    if added is None or read is None or graph.only_reader(added.outputs[0]) is not root:
        return None
    affine, variance = read[1], read[0].producer()
    if affine.axis is not None or affine.scales or affine.shift[0] <= 0:
        return None
    axis = None if variance is None else _mean_axis(variance, facts)
    if variance is None or axis is None:
        return None
    square = graph.value(variance.inputs[0]).producer()
    values = None if square is None else _squared(square)
    if square is None or values is None or graph.only_reader(square.outputs[0]) is not variance:
        return None
    quotient = _quotient(root, values)
    if quotient is None or graph.only_reader(variance.outputs[0]) is not added:
        return None
    rank = facts.rank(values)
    assert rank is not None, "its mean has a known axis"
    nodes = (square, variance, added, root)
    return Quotient(values, axis, rank, float(affine.shift[0]), nodes, quotient)


def _layer_norm_of(found: Quotient, facts: Facts) -> Norm | None:
    """The normalization of what the values are the distance of from their mean; None if they are
    none.
    """
    centred, less = found.values, found.values.producer()
    if less is None or less.op_type != "Sub" or less.domain:
        return None
    x, mean = graph.value(less.inputs[0]), graph.value(less.inputs[1]).producer()
    if mean is None or mean.inputs[0] is not x or _mean_axis(mean, facts) != found.axis:
        return None
    is_read_between = set(graph.consumers(centred)) != {found.nodes[0], found.quotient[-1]}
    if (
        centred.is_graph_output()
        or is_read_between
        or graph.only_reader(mean.outputs[0]) is not less
    ):
        return None  # 4.
    size = facts.size(x, found.axis)
    if not size or not facts.holds_float32(x):
        return None
    nodes = (mean, less, *found.nodes, *found.quotient)
    return Norm(x, size, found, nodes)


def _needs_other_form(found: Quotient, behind: Chain | None, facts: Facts) -> bool:
    """Whether onnxruntime would merge a root mean square, were it written otherwise (5.)."""
    if found.nodes[0].op_type == "Pow" and len(found.quotient) == 1:
        return False
    if behind is None or behind.nodes[0].op_type != "Mul":
        return False
    read = affine_of(behind.nodes[0], facts)
    return read is not None and read[1].axis == found.axis


def _reform(found: Quotient) -> Applied:
    """Edit in place: the square is a Pow, the quotient a Div."""
    square, *_, root = found.nodes
    last = found.quotient[-1]
    two = constant(graph.home(last), f"{square.name}_exponent", np.array(2.0))
    put_in_place([square], ir.Node("", "Pow", [found.values, two], name=square.name))
    quotient = ir.Node("", "Div", [found.values, root.outputs[0]], name=last.name)
    put_in_place(found.quotient, quotient)
    return Applied("layer_norm", str(last.name), tuple(str(n.name) for n in found.quotient[:-1]))


def _mean_axis(node: ir.Node, facts: Facts) -> int | None:
    """The one axis, counted from the front, that the node is the mean over, and keeps (1.)."""
    if node.op_type != "ReduceMean" or node.domain or not graph.attribute(node, "keepdims", 1):
        return None
    axes, rank = axes_of(node), facts.rank(node.inputs[0])
    return axes[0] % rank if axes is not None and rank is not None and len(axes) == 1 else None


def _squared(node: ir.Node) -> ir.Value | None:
    """What the node squares (2.)."""
    first, *others = node.inputs
    if node.domain or len(others) != 1:
        return None
    if node.op_type == "Mul" and others[0] is first:
        return first
    return first if node.op_type == "Pow" and graph.number(others[0]) == 2 else None


def _quotient(root: ir.Node, centred: ir.Value) -> tuple[ir.Node, ...] | None:
    """The nodes that divide it by the root, the last last (2.)."""
    reader = graph.only_reader(root.outputs[0])
    if reader is None or reader.domain:
        return None
    if reader.op_type == "Div" and list(reader.inputs) == [centred, root.outputs[0]]:
        return (reader,)
    inverts = reader.op_type == "Reciprocal" or (
        reader.op_type == "Div" and graph.number(reader.inputs[0]) == 1
    )
    product = graph.only_reader(reader.outputs[0]) if inverts else None
    if product is None or product.op_type != "Mul" or product.domain:
        return None
    return (reader, product) if set(product.inputs) == {centred, reader.outputs[0]} else None


def _write(norm: Norm, behind: Chain | None) -> Applied:
    """The one operator, in place of the last of the nodes; an inner axis is moved for it."""
    nodes, scale, shift = norm.nodes, np.ones(norm.size), np.zeros(norm.size)
    if behind is not None and behind.affine.axis in (None, norm.quotient.axis):  # 3.
        nodes = (*nodes, *behind.nodes)
        scale, shift = behind.affine.widened(norm.size)
    last = nodes[-1]
    inside, name = graph.home(last), str(last.name)
    inputs = [norm.x, constant(inside, f"{name}_scale", np.array(scale))]
    if shift.any():
        inputs.append(constant(inside, f"{name}_shift", np.array(shift)))
    attributes = [ir.AttrInt64("axis", -1), ir.AttrFloat32("epsilon", norm.quotient.epsilon)]
    new = ir.Node("", "LayerNormalization", inputs, attributes, name=name)
    gone = tuple(str(n.name) for n in nodes[:-1])
    old = sorted(nodes, key=list(inside).index)
    if norm.quotient.is_of_rows:
        put_in_place(old, new)
        return Applied("layer_norm", name, gone)
    _put_turned(old, new, norm.quotient)
    return Applied("inner_layer_norm", name, gone)


def _put_turned(old: Sequence[ir.Node], new: ir.Node, found: Quotient) -> None:
    """The new node in place of the old ones, between two Transposes."""
    there = [*(a for a in range(found.rank) if a != found.axis), found.axis]
    back = [there.index(a) for a in range(found.rank)]
    first = transpose(graph.value(new.inputs[0]), there, f"{new.name}_turned")
    new.replace_input_with(0, first.outputs[0])
    put_in_place(old, first, new, transpose(new.outputs[0], back, f"{new.name}_back"))
    for node in (first, new):
        node.outputs[0].shape = None

"""Normalizations of rows in the form that onnxruntime computes as one operator."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from quant_core.model import graph
from quant_core.optimize.affine import affine_of
from quant_core.optimize.applied import Applied
from quant_core.optimize.chains import Chain, chains
from quant_core.optimize.edit import axes_of, constant, number, only_reader, put_in_place, remove
from quant_core.optimize.facts import Facts

OPSET = 17  # the first with LayerNormalization


def layer_norm(model: ir.Model, facts: Facts) -> list[Applied]:
    """Rows less their mean over their deviation, or rows over their root mean square, whichever way
    that is written.

        d = x - ReduceMean(x)
        d / Sqrt(ReduceMean(d * d) + e) [* g] [+ b]       =>   LayerNormalization(x, g, b)

        x * Reciprocal(Sqrt(ReduceMean(x * x) + e)) * g   =>   x / Sqrt(ReduceMean(x^2) + e) * g

    1. The means are over the last axis alone, which is kept.
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
    for inside in graph.graphs_of(model):
        behind = {  # 4.
            chain.source: chain
            for chain in chains(inside, facts)
            if only_reader(chain.source) is chain.nodes[0]
        }
        for root in [n for n in inside if n.op_type == "Sqrt" and not n.domain]:
            found = _read(root, facts) if root.graph is inside else None
            if found is None:
                continue
            chain = behind.get(found.quotient[-1].outputs[0])
            norm = _layer_norm_of(found, facts) if has_operator else None
            if norm is not None:
                applied.append(_write(inside, norm, chain, facts))
            elif _needs_other_form(found, chain, facts):
                applied.append(_reform(inside, found))
    return applied


@dataclass(frozen=True, slots=True)
class Quotient:
    """Values over the root of their mean square.

    nodes     that make the root of the values: their square first, the Sqrt last
    quotient  that divide by it, the last last
    """

    values: ir.Value
    epsilon: float
    nodes: tuple[ir.Node, ...]
    quotient: tuple[ir.Node, ...]


@dataclass(frozen=True, slots=True)
class Norm:
    """What is normalized, along how many columns, and the nodes that do it, the last last."""

    x: ir.Value
    columns: int
    epsilon: float
    nodes: tuple[ir.Node, ...]


def _read(root: ir.Node, facts: Facts) -> Quotient | None:
    """The quotient by this root, None if it is another."""
    added = graph.value(root.inputs[0]).producer()
    read = None if added is None else affine_of(added, facts)
    if added is None or read is None or only_reader(added.outputs[0]) is not root:
        return None
    affine, variance = read[1], read[0].producer()
    if affine.axis is not None or affine.scales or affine.shift[0] <= 0:
        return None
    if variance is None or not _is_mean(variance, facts):
        return None
    square = graph.value(variance.inputs[0]).producer()
    values = None if square is None else _squared(square)
    if square is None or values is None or only_reader(square.outputs[0]) is not variance:
        return None
    quotient = _quotient(root, values)
    if quotient is None or only_reader(variance.outputs[0]) is not added:
        return None
    return Quotient(values, float(affine.shift[0]), (square, variance, added, root), quotient)


def _layer_norm_of(found: Quotient, facts: Facts) -> Norm | None:
    """The normalization of what the values are the distance of from their mean; None if they are
    none.
    """
    centred, less = found.values, found.values.producer()
    if less is None or less.op_type != "Sub" or less.domain:
        return None
    x, mean = graph.value(less.inputs[0]), graph.value(less.inputs[1]).producer()
    if mean is None or not _is_mean(mean, facts) or mean.inputs[0] is not x:
        return None
    is_read_between = set(graph.consumers(centred)) != {found.nodes[0], found.quotient[-1]}
    if centred.is_graph_output() or is_read_between or only_reader(mean.outputs[0]) is not less:
        return None  # 4.
    columns = facts.size(x, -1)
    if not columns or facts.types.get(str(x.name)) != ir.DataType.FLOAT:
        return None
    return Norm(x, columns, found.epsilon, (mean, less, *found.nodes, *found.quotient))


def _needs_other_form(found: Quotient, behind: Chain | None, facts: Facts) -> bool:
    """Whether onnxruntime would merge a root mean square, were it written otherwise (5.)."""
    if found.nodes[0].op_type == "Pow" and len(found.quotient) == 1:
        return False
    rank = facts.rank(found.values)
    if behind is None or rank is None or behind.nodes[0].op_type != "Mul":
        return False
    read = affine_of(behind.nodes[0], facts)
    return read is not None and read[1].axis == rank - 1


def _reform(inside: ir.Graph, found: Quotient) -> Applied:
    """Edit in place: the square is a Pow, the quotient a Div."""
    square, *_, root = found.nodes
    last = found.quotient[-1]
    two = constant(inside, f"{square.name}_exponent", np.array(2.0))
    pairs = (
        (square, ir.Node("", "Pow", [found.values, two], name=square.name)),
        (last, ir.Node("", "Div", [found.values, root.outputs[0]], name=last.name)),
    )
    for old, new in pairs:
        put_in_place(old, new)
    remove([square])
    remove(found.quotient)
    return Applied("layer_norm", str(last.name), tuple(str(n.name) for n in found.quotient[:-1]))


def _is_mean(node: ir.Node, facts: Facts) -> bool:
    """Whether it is the mean over the last axis, which is kept (1.)."""
    if node.op_type != "ReduceMean" or node.domain or not graph.attribute(node, "keepdims", 1):
        return False
    axes, rank = axes_of(node), facts.rank(node.inputs[0])
    return axes is not None and rank is not None and [a % rank for a in axes] == [rank - 1]


def _squared(node: ir.Node) -> ir.Value | None:
    """What the node squares (2.)."""
    first, *others = node.inputs
    if node.domain or len(others) != 1:
        return None
    if node.op_type == "Mul" and others[0] is first:
        return first
    return first if node.op_type == "Pow" and number(others[0]) == 2 else None


def _quotient(root: ir.Node, centred: ir.Value) -> tuple[ir.Node, ...] | None:
    """The nodes that divide it by the root, the last last (2.)."""
    reader = only_reader(root.outputs[0])
    if reader is None or reader.domain:
        return None
    if reader.op_type == "Div" and list(reader.inputs) == [centred, root.outputs[0]]:
        return (reader,)
    inverts = reader.op_type == "Reciprocal" or (
        reader.op_type == "Div" and number(reader.inputs[0]) == 1
    )
    product = only_reader(reader.outputs[0]) if inverts else None
    if product is None or product.op_type != "Mul" or product.domain:
        return None
    return (reader, product) if set(product.inputs) == {centred, reader.outputs[0]} else None


def _write(inside: ir.Graph, norm: Norm, behind: Chain | None, facts: Facts) -> Applied:
    """The one operator, in place of the last of the nodes."""
    rank = facts.rank(norm.x)
    assert rank is not None
    nodes, scale, shift = norm.nodes, np.ones(norm.columns), np.zeros(norm.columns)
    if behind is not None and behind.affine.axis in (None, rank - 1):  # 3.
        nodes = (*nodes, *behind.nodes)
        scale, shift = behind.affine.widened(norm.columns)
    last = nodes[-1]
    name = str(last.name)
    inputs = [norm.x, constant(inside, f"{name}_scale", np.array(scale))]
    if shift.any():
        inputs.append(constant(inside, f"{name}_shift", np.array(shift)))
    attributes = [ir.AttrInt64("axis", -1), ir.AttrFloat32("epsilon", norm.epsilon)]
    new = ir.Node("", "LayerNormalization", inputs, attributes, name=name)
    put_in_place(last, new)
    remove(sorted(nodes, key=list(inside).index))
    return Applied("layer_norm", name, tuple(str(n.name) for n in nodes[:-1]))

"""Several Convs become one."""

from __future__ import annotations

from math import prod

import numpy as np
import onnx_ir as ir

from quant_core.model import graph
from quant_core.optimize import convolution
from quant_core.optimize.affine import Affine, affine_of
from quant_core.optimize.applied import Applied
from quant_core.optimize.convolution import Convolution
from quant_core.optimize.edit import put_in_place, remove
from quant_core.optimize.facts import Facts

CHEAPER = 0.9  # of the products of two Convs: what one may have that takes their place


def merge_parallel_convs(model: ir.Model, facts: Facts) -> list[Applied]:
    """Convs of the same tensor that are added, as RepVGG, MobileOne and PP-LCNet train them.

        Conv(x, w3) + Conv(x, w1) + BatchNormalization(x)   =>   Conv(x, w)

    1. The sum is a tree of Adds, each read by the next alone; at least two terms read one tensor x
       and are Convs, or one is a Conv and another an affine operator on x.
    2. The kernel of one Conv holds those of the others; x itself may be a term beside two Convs.
    3. A term that others read too is no term to merge.

    Source: Ding et al. 2021, "RepVGG", arXiv 2101.03697, section 3.3.
    """
    applied = []
    for node in graph.nodes_of(model, "Add"):
        done = _merge_sum(graph.home(node), node, facts)
        applied += [done] if done else []
    return applied


def _is_sum(node: ir.Node | None) -> bool:
    return node is not None and node.op_type == "Add" and not node.domain


def _merge_sum(inside: ir.Graph, root: ir.Node, facts: Facts) -> Applied | None:
    if _is_sum(graph.only_reader(root.outputs[0])):
        return None  # the tree's own root has its turn
    adds, terms = _tree(root)
    shape = facts.shape(root.outputs[0])
    if len(set(terms)) != len(terms) or any(
        facts.shape(t) is None or facts.rank(t) != len(shape or ()) for t in terms
    ):
        return None
    convs = {t: c for t in terms if (c := _conv_term(t)) is not None}
    for x in dict.fromkeys(graph.value(t.producer().inputs[0]) for t in convs):  # type: ignore[union-attr]
        mine = {t: c for t, c in convs.items() if t.producer().inputs[0] is x}  # type: ignore[union-attr]
        like = max(mine.values(), key=lambda c: prod(c.taps))
        for t in terms:
            if t not in mine and (same := _affine_term(t, x, like, facts, len(mine))) is not None:
                mine[t] = same
        merged = convolution.added(list(mine.values())) if len(mine) > 1 else None
        if merged is not None:
            return _write(inside, root, adds, terms, x, mine, merged)
    return None


def _tree(root: ir.Node) -> tuple[list[ir.Node], list[ir.Value]]:
    """The Adds of a sum, the last first, and its terms."""
    adds, terms, todo = [root], [], [graph.value(v) for v in root.inputs]
    while todo:
        value = todo.pop(0)
        producer = value.producer()
        if producer is not None and _is_sum(producer) and graph.only_reader(value) in adds:
            adds.append(producer)
            todo += [graph.value(v) for v in producer.inputs]
        else:
            terms.append(value)
    return adds, terms


def _conv_term(term: ir.Value) -> Convolution | None:
    producer = term.producer()
    if producer is None or graph.only_reader(term) is None:  # 3.
        return None
    return convolution.read(producer)


def _affine_term(
    term: ir.Value, x: ir.Value, like: Convolution, facts: Facts, convs: int
) -> Convolution | None:
    """x itself, or what one affine operator makes of it, as a convolution."""
    producer = term.producer()
    affine = None
    if term is x and convs > 1:  # 2.
        affine = Affine(np.ones(1), np.zeros(1))
    elif producer is not None and graph.only_reader(term) is not None:
        read = affine_of(producer, facts)
        if read is not None and read[0] is x:
            affine = read[1]
    if affine is None or affine.axis not in (None, 1):
        return None
    if facts.size(x, 1) != like.outputs:
        return None
    scale, shift = affine.widened(like.outputs)
    return convolution.identity(like, scale, shift)


def _write(
    inside: ir.Graph, root: ir.Node, adds: list[ir.Node], terms: list[ir.Value], x: ir.Value,
    mine: dict[ir.Value, Convolution], merged: Convolution,
) -> Applied:  # fmt: skip
    """One Conv, and Adds for the terms that are not in it."""
    makers = [t.producer() for t in mine if t is not x]
    gone = [n for n in makers if n is not None]
    first = max(
        (n for n in gone if n.op_type == "Conv"), key=lambda n: prod(mine[n.outputs[0]].taps)
    )
    conv = convolution.make(inside, str(first.name), x, merged)
    inside.insert_before(root, conv)
    rest = [t for t in terms if t not in mine]
    last, names = conv.outputs[0], iter([str(n.name) for n in adds])
    for term in rest:
        total = ir.Node("", "Add", [last, term], name=next(names))
        total.outputs[0].name = f"{conv.outputs[0].name}_{total.name}"
        total.outputs[0].type = root.outputs[0].type
        inside.insert_before(root, total)
        last = total.outputs[0]
    graph.replace_value(root.outputs[0], last)
    absorbed = [str(n.name) for n in gone if n is not first] + list(names)
    remove(list(dict.fromkeys([*gone, *reversed(adds)])))
    return Applied("merge_parallel_convs", str(first.name), tuple(absorbed))


def merge_successive_convs(model: ir.Model, facts: Facts) -> list[Applied]:
    """A Conv and a 1 x 1 Conv behind it, with nothing between, where one Conv has less to do.

        Conv(x, w1, b1) -> Conv(w2, b2)   =>   Conv(x, w2 w1, w2 b1 + b2)

    1. The second alone reads the first, takes every pixel alone and pads nothing; both have one
       group.
    2. The one Conv has at most nine tenths of the products of the two.
    """
    applied = []
    for node in graph.nodes_of(model):
        second = graph.only_reader(node.outputs[0]) if node.outputs else None
        if second is None or second.inputs[0] is not node.outputs[0]:
            continue
        one, two = convolution.read(node), convolution.read_pixelwise(second)
        if one is None or two is None or one.groups != 1:  # 1.
            continue
        taps = prod(one.taps)
        both = one.outputs * (one.inputs * taps + two.outputs)
        if one.inputs * two.outputs * taps > CHEAPER * both:  # 2.
            continue
        mix = two.weight.reshape(two.outputs, -1)
        weight = np.tensordot(mix, one.weight, 1)
        conv = Convolution(
            weight, mix @ one.bias + two.bias, one.strides, one.dilations,
            one.begin, one.end, 1,
        )  # fmt: skip
        x = graph.value(node.inputs[0])
        new = convolution.make(graph.home(node), str(second.name), x, conv)
        put_in_place([node, second], new)
        applied.append(Applied("merge_successive_convs", str(new.name), (str(node.name),)))
    return applied

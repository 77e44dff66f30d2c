"""Affine operators go into the weights of the linear ones around them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import onnx_ir as ir

from quant_core.model import graph
from quant_core.optimize import commute, linear
from quant_core.optimize.affine import Affine, Chain, Numbers, chains
from quant_core.optimize.applied import Applied
from quant_core.optimize.edit import bypass, constant, free_name, read_here, remove
from quant_core.optimize.facts import Facts
from quant_core.optimize.fused import ends_fusion

MOST_EDITS = (
    64  # of other nodes for one chain: a graph with many branches has exponentially many paths
)


@dataclass(frozen=True, slots=True)
class Edit:
    """One linear node that takes an affine in, and the tensors on the way that change with it."""

    node: ir.Node
    do: Callable[[], None]
    changed: tuple[ir.Value, ...]


def fold_into_producer(model: ir.Model, facts: Facts) -> list[Applied]:
    """Chains of affine operators behind a linear one.

        Conv(x, w, b) -> ... -> Mul(s) -> Add(t)   =>   Conv(x, s w, s b + t) -> ...

    1. Between them may stand operators that the chain may pass (commute.py).
    2. Every tensor between them is read on this way only, and is no output of the graph.
    3. A MatMul has no bias: it takes the scale, and one Add stays if the chain had more than that.
    4. Factors that belong to an operator which onnxruntime fuses stay (fused.py).
    """
    applied = []
    for inside in graph.graphs_of(model):
        for chain in chains(inside, facts):
            if ends_fusion(chain.source):  # 4.
                continue
            rest = Affine(np.ones(1), np.zeros(1))
            edits = _above(chain.source, chain.affine, inside, facts)
            if edits is None and chain.affine.shifts and len(chain.nodes) > 1:  # 3.
                scale, rest = _apart(chain.affine)
                edits = _above(chain.source, scale, inside, facts)
            if edits is not None:
                applied.append(_absorb("fold_into_producer", chain, edits, rest, facts))
    return applied


def fold_into_consumers(model: ir.Model, facts: Facts) -> list[Applied]:
    """Chains of affine operators before linear ones, all of which take them in.

        Mul(s) -> Add(t) -> ... -> Conv(w, b)   =>   ... -> Conv(s w, b + w t)

    1. Between them may stand operators that the chain may pass (commute.py).
    2. Every way from the chain ends at a linear operator, and meets no output of the graph.
    3. A shift cannot enter a Conv that pads: zeros are padded behind it. Then the scale alone goes
       in, and one Add(t / s) stays if the chain had more than that.
    4. Factors that belong to an operator which onnxruntime fuses stay (fused.py).
    """
    applied = []
    for inside in graph.graphs_of(model):
        for chain in chains(inside, facts):
            if ends_fusion(chain.source):  # 4.
                continue
            rest = Affine(np.ones(1), np.zeros(1))
            edits = _below(chain.output, chain.affine, inside, facts)
            if edits is None and len(chain.nodes) > 1 and _divides(chain.affine):  # 3.
                scale, shift = chain.affine.scale, chain.affine.shift
                rest = Affine.make(np.ones(1), shift / scale, chain.affine.axis)
                only_scale = Affine.make(scale, np.zeros(1), chain.affine.axis)
                edits = _below(chain.output, only_scale, inside, facts)
            if edits:
                applied.append(_absorb("fold_into_consumers", chain, edits, rest, facts))
    return applied


def merge_affine(model: ir.Model, facts: Facts) -> list[Applied]:
    """Chains of affine operators become one Mul and one Add, or less, where that is fewer.

    Mul(s1) -> Add(t1) -> Mul(s2) -> Add(t2)   =>   Mul(s1 s2) -> Add(t1 s2 + t2)
    """
    applied = []
    for inside in graph.graphs_of(model):
        for chain in chains(inside, facts):
            needed = chain.affine.scales + chain.affine.shifts
            if _norm_of(chain) is not None:
                needed = min(needed, 1)
            if needed < len(chain.nodes):
                if not needed and chain.output.is_graph_output():
                    continue  # an output needs a node that writes it
                kept = _write(chain, chain.affine, facts)
                gone = tuple(name for name in chain.names if name not in kept)
                applied.append(Applied("merge_affine", (*kept, chain.names[-1])[0], gone))
    return applied


def _above(value: ir.Value, affine: Affine, inside: ir.Graph, facts: Facts) -> list[Edit] | None:
    """The edits with which the value comes out as the affine makes it, None if there are none."""
    producer = value.producer()
    if producer is None or producer.graph is not inside or not affine.is_sound:
        return None
    if value.is_graph_output() or len(value.uses()) != 1:
        return None
    if linear.takes_output(producer, affine, facts):
        return [Edit(producer, partial(linear.take_output, producer, affine), (value,))]
    for way in commute.upward(producer, affine, facts):
        edits = _all((value,), (_above(v, a, inside, facts) for v, a in way or ()))
        if way and edits is not None:
            return edits
    return None


def _below(value: ir.Value, affine: Affine, inside: ir.Graph, facts: Facts) -> list[Edit] | None:
    """What must be edited so that every reader makes the affine itself; None if one cannot."""
    if not read_here(value, inside) or not affine.is_sound:
        return None
    found: list[list[Edit] | None] = []
    for use in value.uses():
        if linear.takes_input(use.node, use.idx, affine, facts):
            found.append([Edit(use.node, partial(linear.take_input, use.node, affine), ())])
            continue
        way = commute.downward(use.node, use.idx, affine, facts)
        if way is None:
            return None
        moved = tuple(v for v, _ in way)
        found.append(_all(moved, (_below(v, a, inside, facts) for v, a in way)))
    return _all((), found)


def _all(changed: tuple[ir.Value, ...], found: Iterable[list[Edit] | None]) -> list[Edit] | None:
    """All edits, which change these tensors too; None if one way has none or there are too many."""
    edits: list[Edit] = []
    for some in found:
        if some is None or len(edits) + len(some) > MOST_EDITS:
            return None
        edits += [replace(edit, changed=(*edit.changed, *changed)) for edit in some]
    return edits


def _apart(affine: Affine) -> tuple[Affine, Affine]:
    """The scale, and the shift that follows it."""
    scale = Affine.make(affine.scale, np.zeros(1), affine.axis)
    return scale, Affine.make(np.ones(1), affine.shift, affine.axis)


def _divides(affine: Affine) -> bool:
    """Whether the shift can come before the scale and float32 keeps its digits."""
    if not (affine.scales and affine.shifts) or not affine.scale.all():
        return False
    return bool((np.abs(affine.shift / affine.scale) < 1e3).all())


def _absorb(rule: str, chain: Chain, edits: list[Edit], rest: Affine, facts: Facts) -> Applied:
    """The edits are made, and of the chain only the rest stays.

    A tensor with other values than before gets another name: who compares models by the names of
    tensors must not meet it.
    """
    for edit in edits:
        edit.do()
    inside = graph.home(chain.nodes[0])
    for value in dict.fromkeys(v for edit in edits for v in edit.changed):
        value.name = free_name(inside, str(value.name))
    is_changed = any(chain.source in edit.changed for edit in edits)
    kept = _write(chain, rest, facts, takes_name=is_changed)
    gone = tuple(name for name in chain.names if name not in kept)
    return Applied(rule, str(edits[0].node.name), gone)


def _write(chain: Chain, affine: Affine, facts: Facts, *, takes_name: bool = False) -> list[str]:
    """The chain's nodes go; as few as can do the affine come, under names of theirs, the result.

    takes_name  whether the source has the values of the chain's output now
    """
    last, kept = chain.source, []
    norm = _norm_of(chain)
    if norm is not None and affine.scales and affine.shifts:
        last = _append(chain, norm, last, _norm_inputs(affine, facts.size(chain.output, 1)))
        kept.append(str(norm.name))
    else:
        for op_type, numbers, idle in (("Mul", affine.scale, 1), ("Add", affine.shift, 0)):
            if (numbers != idle).any():
                free = [n for n in chain.nodes if n.name not in kept]
                like = next((n for n in free if n.op_type == op_type), free[-1])
                array = _broadcastable(numbers, affine.axis, facts.rank(chain.output))
                last = _append(chain, like, last, [array], op_type)
                kept.append(str(like.name))
    if last is chain.source and not takes_name:
        bypass(chain.output, last)
    else:
        graph.replace_value(chain.output, last)
    remove(chain.nodes)
    return kept


def _append(
    chain: Chain, like: ir.Node, source: ir.Value, arrays: list[Numbers], op_type: str | None = None
) -> ir.Value:
    """The result of a new node with the name of a chain's node, before the chain's last."""
    inside, name = graph.home(like), str(like.name)
    constants = [constant(inside, name, a) for a in arrays]
    attributes = [ir.AttrFloat32("epsilon", 0.0)] if op_type is None else []
    node = ir.Node("", op_type or like.op_type, [source, *constants], attributes, name=name)
    value = node.outputs[0]
    value.name = free_name(inside, name)
    value.type, value.shape = chain.output.type, chain.output.shape
    inside.insert_before(chain.nodes[-1], node)
    return value


def _norm_of(chain: Chain) -> ir.Node | None:
    """A BatchNormalization of the chain that could do all of it."""
    if chain.affine.axis not in (None, 1):
        return None
    return next((n for n in chain.nodes if n.op_type == "BatchNormalization"), None)


def _norm_inputs(affine: Affine, channels: int | None) -> list[Numbers]:
    """(scale, bias, mean, variance) of a BatchNormalization without an epsilon that does this."""
    assert channels is not None
    scale, shift = affine.widened(channels)
    return [scale, shift, np.zeros(channels), np.ones(channels)]


def _broadcastable(numbers: Numbers, axis: int | None, rank: int | None) -> Numbers:
    """Shaped so that the numbers meet their axis of a tensor of that rank."""
    if axis is None:
        return numbers.reshape(())
    assert rank is not None
    return numbers.reshape(-1, *[1] * (rank - axis - 1))

"""Affine operators go into the weights of the linear ones around them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias

import numpy as np
import onnx_ir as ir

from quant_core.optimize import commute, linear
from quant_core.optimize.affine import Affine, Numbers
from quant_core.optimize.applied import Applied
from quant_core.optimize.chains import Chain, chains, write_chain
from quant_core.optimize.edit import free_name, read_here
from quant_core.optimize.facts import Facts
from quant_core.optimize.fused import ends_fusion

MOST_EDITS = 64  # for one chain: a graph with many branches has exponentially many paths
MOST_SHIFT = 1e3  # of what scales then make smaller
IDENTITY = Affine(np.ones(1), np.zeros(1))

Parts: TypeAlias = tuple[Affine, Affine]  # what goes into linear operators, and what stays


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

    def edits(chain: Chain, affine: Affine) -> list[Edit] | None:
        return _above(chain.source, affine, chain.inside, facts)

    return _fold("fold_into_producer", model, facts, edits, _scale_before_shift)


def fold_into_consumers(model: ir.Model, facts: Facts) -> list[Applied]:
    """Chains of affine operators before linear ones, all of which take them in.

        Mul(s) -> Add(t) -> ... -> Conv(w, b)   =>   ... -> Conv(s w, b + w t)

    1. Between them may stand operators that the chain may pass (commute.py).
    2. Every way from the chain ends at a linear operator, and meets no output of the graph.
    3. A shift cannot enter a Conv that pads: zeros are padded behind it. Then the scale alone goes
       in, and one Add(t / s) stays if the chain had more than that.
    4. Factors that belong to an operator which onnxruntime fuses stay (fused.py).
    """

    def edits(chain: Chain, affine: Affine) -> list[Edit] | None:
        return _below(chain.output, affine, chain.inside, facts)

    return _fold("fold_into_consumers", model, facts, edits, _shift_before_scale)


def _fold(
    rule: str,
    model: ir.Model,
    facts: Facts,
    edits_for: Callable[[Chain, Affine], list[Edit] | None],
    split: Callable[[Affine], Parts | None],
) -> list[Applied]:
    """Each chain goes as a whole if it can, else the part of it that `split` puts first."""
    applied = []
    for chain in chains(model, facts):
        if ends_fusion(chain.source):  # 4.
            continue
        parts = split(chain.affine) if len(chain.nodes) > 1 else None  # 3.
        for taken, rest in filter(None, ((chain.affine, IDENTITY), parts)):
            edits = edits_for(chain, taken)
            if edits:
                applied.append(_absorb(rule, chain, edits, rest, facts))
                break
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


def _scale_before_shift(affine: Affine) -> Parts | None:
    """A chain's scale, and the shift behind it."""
    if not (affine.scales and affine.shifts):
        return None
    return _parts(affine, affine.shift)


def _shift_before_scale(affine: Affine) -> Parts | None:
    """A chain's scale, and the shift in front of it; None if float32 would lose digits of that."""
    if not (affine.scales and affine.shifts and affine.scale.all()):
        return None
    shift = affine.shift / affine.scale
    if (np.abs(shift) >= MOST_SHIFT).any():
        return None
    return _parts(affine, shift)


def _parts(affine: Affine, shift: Numbers) -> Parts:
    one, none = np.ones(1), np.zeros(1)
    return Affine.make(affine.scale, none, affine.axis), Affine.make(one, shift, affine.axis)


def _absorb(rule: str, chain: Chain, edits: list[Edit], rest: Affine, facts: Facts) -> Applied:
    """The edits are made, and of the chain only the rest stays.

    A tensor with other values than before gets another name: who compares models by the names of
    tensors must not meet it.
    """
    for edit in edits:
        edit.do()
    inside = chain.inside
    for value in dict.fromkeys(v for edit in edits for v in edit.changed):
        value.name = free_name(inside, str(value.name))
    is_changed = any(chain.source in edit.changed for edit in edits)
    kept = write_chain(chain, rest, facts, takes_name=is_changed)
    gone = tuple(name for name in chain.names if name not in kept)
    return Applied(rule, str(edits[0].node.name), gone)

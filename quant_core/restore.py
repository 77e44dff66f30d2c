"""What gives an accuracy back: more bits, or computing in float, for the nodes that hurt most and for no others."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir

from quant_core.candidate import Bench, Candidate
from quant_core.config import Contract, QuantConfig
from quant_core.keeping import keeping, value
from quant_core.material import Material
from quant_core.plan import FLOAT, NodePlan, QuantPlan, make_plan
from quant_core.targets import TARGETS

MOST_TRIED = 8  # of one step, beside its groups
POLISH_GROUPS, POLISH_FEEDS = 12, 16
LEAST_PRICE = 0.01  # of a model's time: less cannot be told from nothing


def restored(model: ir.Model, plan: QuantPlan, nodes: Collection[str], bits: int = 16) -> QuantPlan:
    """The plan with the weights of these nodes in more bits: 8, or 16 (if those hold it) and then computed in float."""
    config = replace(plan.config, layer_bits={**plan.config.layer_bits, **{_literal(n): bits for n in sorted(nodes)}})
    wanted = {n.node: n.compute for n in plan.nodes}
    return varied(model, plan, config, wanted)


def floated(model: ir.Model, plan: QuantPlan, nodes: Collection[str]) -> QuantPlan:
    """The plan with these nodes computed in float, their weights stored as they are."""
    wanted = {n.node: FLOAT if n.node in nodes else n.compute for n in plan.nodes if n.weights}
    return varied(model, plan, plan.config, wanted)


def varied(model: ir.Model, plan: QuantPlan, config: QuantConfig, wanted: Mapping[str, str]) -> QuantPlan:
    """The plan anew with another config, or where nodes compute in other ways; what a search found out stays."""
    return make_plan(model, config, TARGETS[plan.target], wanted, eased=plan.eased, one_scale=plan.one_scale)


@dataclass(frozen=True, slots=True)
class Step:
    """One way to give back: which nodes can take it, in at most how many groups they are ranked, what it makes.

    slows  it costs time, and else bytes
    """

    name: str
    most_groups: int
    concerns: Callable[[NodePlan], bool]
    made: Callable[[ir.Model, QuantPlan, list[str]], QuantPlan]
    slows: bool = False


STEPS = (
    Step("in 8 bits", 16, lambda n: n.storage == "int4", partial(restored, bits=8)),
    Step("in float", 10, lambda n: n.is_rounded and n.compute != FLOAT, floated, slows=True),
    Step("in 16 bits", 8, lambda n: n.is_rounded, partial(restored, bits=16)),
)
MAX_EVALUATIONS = sum(step.most_groups + MOST_TRIED for step in STEPS)


def restore(
    material: Material,
    start: Candidate,
    bench: Bench,
    contract: Contract,
    trace: list[dict[str, Any]],
    progress: Callable[[str], None],
) -> Candidate:
    """The candidate that keeps the contract with the fewest nodes restored, else the best one found.

    1. One of STEPS after the other: the next only where all that this one can give is not enough.
    2. Nodes in groups: how much less noise has the whole model with this group alone restored?
    3. The groups that help most per millisecond, or per weight, are restored first: 1, 2, 4, ... until the contract
       holds, then bisection. What stays in 4 bits is rounded anew each time: it made up for errors that are gone.
    4. While there are 4 bits to give, the contract must also hold by the agreement that a plan's noise leads one to
       expect: which of some near-equal plans agrees most often with float on these very samples is luck.
    """

    def given_back(step: Step, base: Candidate, nodes: list[str], known: Material | None) -> Candidate:
        plan = step.made(material.model, base.plan, nodes)
        return (known or material.refitted(plan)).build(plan, f"{base.name}, {len(nodes)} nodes {step.name}")

    tried, places = [start], [(0, 0)]
    for number, step in enumerate(STEPS):
        base = tried[-1]
        nodes = [n.node for n in base.plan.nodes if n.weights and step.concerns(n)]
        if not nodes:
            continue
        groups = [list(g) for g in np.array_split(np.array(nodes, object), min(len(nodes), step.most_groups))]
        gain = []
        known = material if base is start else material.refitted(base.plan)
        for i, group in enumerate(groups):
            progress(f"what {group[0]} {step.name} gains")
            better = bench.judge(given_back(step, base, group, known), timed=step.slows)
            price = _price(base, better, group, step)
            gain.append((-(base.noise - better.noise) / price, -value(better, contract), i))
        order = [groups[i] for *_, i in sorted(gain)]
        low, high, width = 0, None, 1
        for _ in range(MOST_TRIED):
            if low == len(order) or (high is not None and high - low <= 1):
                break
            count = min(low + width, len(order)) if high is None else (low + high) // 2
            harmful = [n for group in order[:count] for n in group]
            progress(f"{len(harmful)} of {len(nodes)} nodes {step.name}")
            tried.append(bench.judge(given_back(step, base, harmful, None)))
            places.append((number, count))
            trace.append(tried[-1].trace())
            if keeping(tried[-1:], contract, bench, tried if step is STEPS[0] else ()):
                high = count
            else:
                low, width = count, 2 * width
        if high is not None or keeping(tried, contract, bench):
            break
    if sure := keeping(tried, contract, bench, tried):
        return min(sure, key=lambda c: places[tried.index(c)])
    return max(keeping(tried, contract, bench) or tried, key=lambda c: value(c, contract))


def _price(base: Candidate, better: Candidate, nodes: list[str], step: Step) -> float:
    """What restoring these nodes takes: milliseconds, or weights to be stored in more bits."""
    if step.slows and base.cost is not None and better.cost is not None:
        return max(better.cost.quantized_ms - base.cost.quantized_ms, LEAST_PRICE * base.cost.quantized_ms)
    return float(sum(n.elements for n in base.plan.nodes if n.node in nodes))


def polish(
    material: Material, start: Candidate, bench: Bench, trace: list[dict[str, Any]], progress: Callable[[str], None]
) -> Candidate:
    """The candidate of most worth among `start` and those with the most harmful nodes in float: 1, 2, 4, ... groups.

    Nodes are ranked in at most POLISH_GROUPS groups of neighbours, on a few samples.
    """
    nodes = [n.node for n in start.plan.nodes if n.weights and n.compute != FLOAT]
    quick = replace(bench, samples=bench.samples.spread(POLISH_FEEDS))
    groups = [list(g) for g in np.array_split(np.array(nodes, object), min(len(nodes), POLISH_GROUPS))] if nodes else []
    gain = []
    for i, group in enumerate(groups):
        progress(f"what {group[0]} in float gains")
        gain.append((-quick.judge(_in_float(material, start, group), timed=False).sqnr_db, i))
    order = [groups[i] for _, i in sorted(gain)]
    best, count = start, 1
    while count < len(order):
        harmful = [n for group in order[:count] for n in group]
        candidate = bench.judge(_in_float(material, start, harmful))
        trace.append(candidate.trace())
        if candidate.worth <= best.worth:
            break
        best, count = candidate, 2 * count
    return best


def _in_float(material: Material, start: Candidate, nodes: list[str]) -> Candidate:
    return material.build(floated(material.model, start.plan, nodes), f"{start.name}, {len(nodes)} nodes in float")


def _literal(name: str) -> str:
    """A glob that matches this name only."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)

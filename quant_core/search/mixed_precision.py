"""What gives an accuracy back: more bits, or computing in float, for the nodes that hurt most and for no others."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir

from quant_core.config import Contract
from quant_core.errors import ModelError
from quant_core.plan.make import replan
from quant_core.plan.types import Compute, NodeChoice, NodePlan, QuantPlan, Storage
from quant_core.search.calibrated import Material
from quant_core.search.candidate import Bench, Candidate
from quant_core.search.keeping import is_expected_to_keep, keeping, value

POLISH_GROUPS, POLISH_FEEDS = 12, 16
LEAST_PRICE = 0.01  # of a model's time: less cannot be told from nothing


def restored(
    model: ir.Model, plan: QuantPlan, nodes: Collection[str], storage: Storage = Storage.FLOAT16
) -> QuantPlan:
    """The plan with the weights of these nodes in more bits: int8, or float16 if that holds them, computed in float."""
    return replan(model, plan, dict.fromkeys(nodes, NodeChoice(storage=storage)))


def floated(model: ir.Model, plan: QuantPlan, nodes: Collection[str]) -> QuantPlan:
    """The plan with these nodes computed in float, their weights stored as they are."""
    return replan(model, plan, dict.fromkeys(nodes, NodeChoice(Compute.FLOAT)))


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
    Step(
        "in 8 bits",
        16,
        lambda n: n.storage is Storage.INT4,
        partial(restored, storage=Storage.INT8),
    ),
    Step(
        "in float", 10, lambda n: n.is_rounded and n.compute != Compute.FLOAT, floated, slows=True
    ),
    Step("in 16 bits", 8, lambda n: n.is_rounded, restored),
)
MAX_EVALUATIONS = sum(1 + step.most_groups + 2 * step.most_groups.bit_length() for step in STEPS)


def restore(
    material: Material,
    start: Candidate,
    bench: Bench,
    contract: Contract,
    trace: list[dict[str, Any]],
    progress: Callable[[str], None],
) -> Candidate:
    """The candidate that keeps the contract's accuracy with the fewest nodes restored, else the best one found.

    1. One of STEPS after the other: the next only where all that this one can give is not enough.
    2. Nodes in groups: which give most per weight, or per millisecond?
    3. How many groups, best first, are enough? Bisection. What stays in 4 bits is rounded anew each time: it made up
       for errors that are gone.
    4. While there are 4 bits to give, bisection goes by the agreement that is to be expected; what it finds must keep
       the contract both as expected and as measured.
    """
    accuracy = replace(contract, min_speedup=None, max_size_ratio=None)
    work = _Restoring(material, bench, accuracy, trace, progress, [start])
    try:
        enough = work.enough()
    except ModelError as error:  # one that does not load is no reason to lose the others
        trace.append({"candidate": f"more than {work.tried[-1].name}", "error": str(error)})
        enough = None
    return enough or max(
        keeping(work.tried, accuracy, bench) or work.tried, key=lambda c: value(c, contract)
    )


@dataclass(frozen=True, slots=True)
class _Restoring:
    """What `restore` works with, and the candidates that it has tried."""

    material: Material
    bench: Bench
    accuracy: Contract
    trace: list[dict[str, Any]]
    progress: Callable[[str], None]
    tried: list[Candidate]

    def enough(self) -> Candidate | None:
        """The candidate with the fewest nodes restored, by the first of STEPS that can make it keep the contract."""
        base, known = self.tried[0], self.material
        for step in STEPS:
            nodes = [n.node for n in base.plan.nodes if n.weights and step.concerns(n)]
            if not nodes:
                continue
            fitted = self.attempt(step, base, nodes)
            full = self.tried[-1]
            if self.keeps(step, full):
                groups = self.ranked(
                    step, base, nodes, *((base, known) if step.slows else (full, fitted))
                )
                return self.fewest(step, base, groups)
            if keeping(self.tried, self.accuracy, self.bench):
                return None
            base, known = full, fitted
        return None

    def attempt(self, step: Step, base: Candidate, nodes: list[str]) -> Material:
        """Tries the candidate with these nodes restored. Returns what its weights were rounded by."""
        name = f"{base.name}, {len(nodes)} nodes {step.name}"
        self.progress(name)
        plan = step.made(self.material.model, base.plan, nodes)
        fitted = self.material.refitted(plan)
        self.tried.append(self.bench.judge(fitted.build(plan, name)))
        self.trace.append(self.tried[-1].trace())
        return fitted

    def should_keep(self, step: Step, candidate: Candidate) -> bool:
        """As expected while there are 4 bits to give, else as measured."""
        if step is STEPS[0]:
            return is_expected_to_keep(candidate, self.accuracy, self.bench, self.tried)
        return bool(keeping([candidate], self.accuracy, self.bench))

    def keeps(self, step: Step, candidate: Candidate) -> bool:
        """As expected and as measured."""
        return self.should_keep(step, candidate) and bool(
            keeping([candidate], self.accuracy, self.bench)
        )

    def ranked(
        self, step: Step, base: Candidate, nodes: list[str], end: Candidate, known: Material
    ) -> list[list[str]]:
        """Groups of neighbours, those that give most for what they take first.

        Bits: a group gives what the model with all nodes restored (`end`) loses without it. Beside others in 4 bits,
        which were rounded to make up for its errors, it would seem to give nothing. Time: it gives what the model with
        none restored (`end`) gains with it. Beside others in float, integers would seem to save nothing: they pay for
        conversions.
        """
        sign = 1 if step.slows else -1
        gains = []
        groups = [
            list(g)
            for g in np.array_split(np.array(nodes, object), min(len(nodes), step.most_groups))
        ]
        for group in groups:
            self.progress(f"what {group[0]} {step.name} gains")
            chosen = group if step.slows else [n for n in nodes if n not in group]
            made = known.build(step.made(self.material.model, base.plan, chosen), base.name)
            other = self.bench.judge(made, timed=step.slows)
            price = _price(end, other, group, step)
            better = value(other, self.accuracy) - value(
                end, self.accuracy
            )  # where outputs are integers
            gains.append((sign * (end.noise - other.noise) / price, sign * better))
        return [groups[i] for i in sorted(range(len(groups)), key=lambda i: gains[i], reverse=True)]

    def fewest(self, step: Step, base: Candidate, groups: list[list[str]]) -> Candidate:
        """The candidate with the fewest groups restored that keeps the contract. The last one tried has all of them."""
        made = {len(groups): self.tried[-1]}

        def of(count: int) -> Candidate:
            if count not in made:
                self.attempt(step, base, [n for group in groups[:count] for n in group])
                made[count] = self.tried[-1]
            return made[count]

        low, high, width = 0, len(groups), 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.should_keep(step, of(middle)) else (middle, high)
        while high < len(groups) and not self.keeps(step, of(high)):
            high, width = min(high + width, len(groups)), 2 * width
        return made[high]


def _price(end: Candidate, other: Candidate, nodes: list[str], step: Step) -> float:
    """What restoring these nodes takes: milliseconds, or weights to be stored in more bits."""
    if step.slows and end.cost is not None and other.cost is not None:
        return max(
            other.cost.quantized_ms - end.cost.quantized_ms, LEAST_PRICE * end.cost.quantized_ms
        )
    return float(sum(n.elements for n in end.plan.nodes if n.node in nodes))


def polish(
    material: Material,
    start: Candidate,
    bench: Bench,
    trace: list[dict[str, Any]],
    progress: Callable[[str], None],
) -> Candidate:
    """The candidate of most worth among `start` and those with the most harmful nodes in float: 1, 2, 4, ... groups.

    Nodes are ranked in at most POLISH_GROUPS groups of neighbours, on a few samples.
    """
    nodes = [n.node for n in start.plan.nodes if n.weights and n.compute != Compute.FLOAT]
    quick = replace(bench, samples=bench.samples.subsample(POLISH_FEEDS))
    groups = (
        [list(g) for g in np.array_split(np.array(nodes, object), min(len(nodes), POLISH_GROUPS))]
        if nodes
        else []
    )
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
    return material.build(
        floated(material.model, start.plan, nodes), f"{start.name}, {len(nodes)} nodes in float"
    )

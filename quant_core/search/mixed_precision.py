"""Mixed precision: more bits, or float, for the nodes that cost the most accuracy."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir

from quant_core.config import Contract
from quant_core.errors import ModelError
from quant_core.numerics.granularity import PerChannel
from quant_core.plan.make import replan
from quant_core.plan.types import Compute, NodeChoice, NodePlan, QuantPlan, Storage
from quant_core.search.calibrated import CalibratedModel
from quant_core.search.candidate import (
    Bench,
    Candidate,
    contract_value,
    is_expected_to_satisfy,
    satisfies,
    satisfying,
)
from quant_core.search.policy import POLICY
from quant_core.search.variants import Trial

Groups = list[list[str]]  # names of neighbouring nodes that are promoted together
Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Promotion:
    """One way to give accuracy back.

    label         for people
    choice        what each promoted node is asked for
    concerns      which nodes with weights can be promoted
    max_groups    in how many groups they are ranked at most
    takes_time    whether its price is time; else it is bytes
    by_agreement  whether the number of groups is searched by the agreement that is to be expected,
                  because rounding the others anew makes the measured one jump
    """

    label: str
    choice: NodeChoice
    concerns: Callable[[NodePlan], bool]
    max_groups: int
    takes_time: bool = False
    by_agreement: bool = False

    def nodes_of(self, plan: QuantPlan) -> list[str]:
        """The nodes of the plan that can be promoted, in graph order."""
        return [n.node for n in plan.nodes if n.weights and self.concerns(n)]

    def plan(self, model: ir.Model, plan: QuantPlan, nodes: Collection[str]) -> QuantPlan:
        """The plan with these nodes promoted."""
        return with_choice(model, plan, nodes, self.choice)


IN_INT8 = NodeChoice(storage=Storage.INT8)
IN_FLOAT = NodeChoice(Compute.FLOAT)
IN_FLOAT16 = NodeChoice(storage=Storage.FLOAT16)
IN_OWN_SCALES = NodeChoice(granularity=PerChannel())  # of each channel; in 4 bits they are finer

# In the order in which they are tried.
PROMOTIONS = (
    Promotion(
        "in 8 bits",
        IN_INT8,
        lambda n: n.storage is Storage.INT4,
        POLICY.int8_groups,
        by_agreement=True,
    ),
    Promotion(
        "in float",
        IN_FLOAT,
        lambda n: n.is_rounded and n.compute.is_integer,
        POLICY.float_groups,
        takes_time=True,
    ),
    Promotion("in 16 bits", IN_FLOAT16, lambda n: n.is_rounded, POLICY.float16_groups),
)


def with_choice(
    model: ir.Model, plan: QuantPlan, nodes: Collection[str], choice: NodeChoice
) -> QuantPlan:
    """The plan with this choice for each of these nodes: IN_INT8, IN_FLOAT or IN_FLOAT16.

    IN_FLOAT leaves the weights stored as they are. IN_FLOAT16 computes in float; weights that
    float16 cannot hold are stored in float32.
    """
    return replan(model, plan, dict.fromkeys(nodes, choice))


@dataclass(frozen=True, slots=True, eq=False)
class Promoted:
    """The best candidate, and the trials that led to it."""

    best: Candidate
    trials: tuple[Trial, ...]


def promote(
    calibrated: CalibratedModel,
    start: Candidate,
    bench: Bench,
    contract: Contract,
    progress: Progress,
) -> Promoted:
    """The candidate that satisfies the contract's accuracy with the fewest nodes promoted.

    If none does, it is the one with the best value of the contract's metric.

    1. One of PROMOTIONS after the other: the next only where all nodes by this one are not enough.
    2. Nodes in groups: which gain the most per weight, or per millisecond?
    3. How many groups, best first, are enough? Bisection. What stays in 4 bits is rounded anew
       each time, as it made up for errors that are gone.
    4. While there are 4 bits to promote, bisection goes by the agreement that is to be expected;
       what it finds must satisfy the contract both as expected and as measured.
    """
    accuracy = replace(contract, min_speedup=None, max_size_ratio=None)
    work = _Work(calibrated, bench, accuracy, progress, [start])
    try:
        enough = work.fewest_of_all()
    except ModelError as error:  # one that does not load is no reason to lose the others
        last = work.candidates[-1]
        work.trials.append(Trial(f"more than {last.label}", last.plan, error))
        enough = None
    if enough is None:
        usable = satisfying(work.candidates, accuracy) or work.candidates
        enough = max(usable, key=lambda c: contract_value(c, contract))
    return Promoted(enough, tuple(work.trials))


def promote_without_contract(
    calibrated: CalibratedModel, start: Candidate, bench: Bench, progress: Progress
) -> Promoted:
    """The candidate of most worth among `start` and those with 1, 2, 4, ... groups in float.

    The groups are ranked on a few samples by the SQNR that the model gains with them in float.
    """
    trials: list[Trial] = []
    best = start
    try:
        ranked = _ranked_in_float(calibrated, start, bench, progress)
        count = 1
        while count < len(ranked) and not bench.is_out_of_time:
            candidate = bench.judge(_in_float(calibrated, start, _joined(ranked[:count])))
            trials.append(Trial(candidate.label, candidate.plan, candidate))
            if candidate.worth <= best.worth:
                break
            best, count = candidate, 2 * count
    except ModelError as error:
        trials.append(Trial(f"more than {best.label}", best.plan, error))
    return Promoted(best, tuple(trials))


def _ranked_in_float(
    calibrated: CalibratedModel, start: Candidate, bench: Bench, progress: Progress
) -> Groups:
    """Groups of the nodes that compute in integers; the one that gains the most in float first."""
    nodes = [n.node for n in start.plan.nodes if n.weights and n.compute.is_integer]
    groups = _grouped(nodes, POLICY.free_groups)
    quick = replace(bench, samples=bench.samples.subsample(POLICY.free_samples))
    gains = []
    for group in groups:
        if bench.is_out_of_time:
            break
        progress(f"measuring what {group[0]} in float gains")
        gains.append(quick.judge_fidelity(_in_float(calibrated, start, group)).sqnr_db)
    return _best_first(groups, gains)


def _in_float(calibrated: CalibratedModel, start: Candidate, nodes: list[str]) -> Candidate:
    plan = with_choice(calibrated.model, start.plan, nodes, IN_FLOAT)
    return calibrated.build(plan, f"{start.label}, {len(nodes)} nodes in float")


@dataclass(frozen=True, slots=True)
class _Work:
    """What `promote` works with, and what it has tried so far.

    candidates  the start, and what the trials made
    """

    calibrated: CalibratedModel
    bench: Bench
    accuracy: Contract
    progress: Progress
    candidates: list[Candidate]
    trials: list[Trial] = field(default_factory=list)

    def fewest_of_all(self) -> Candidate | None:
        """The candidate with the fewest nodes promoted, by the first promotion that is enough."""
        base, calibrated = self.candidates[0], self.calibrated
        for promotion in PROMOTIONS:
            nodes = promotion.nodes_of(base.plan)
            if not nodes:
                continue
            full, refitted = self.attempt(promotion, base, nodes)
            if self.is_enough(promotion, full):
                if self.bench.is_out_of_time:
                    return full
                if promotion.takes_time:
                    ranked = self.ranked_by_time(promotion, base, nodes, calibrated)
                else:
                    ranked = self.ranked_by_bytes(promotion, base, nodes, full, refitted)
                return self.fewest(promotion, base, ranked, full)
            if satisfying(self.candidates, self.accuracy):
                return None
            base, calibrated = full, refitted
        return None

    def attempt(
        self, promotion: Promotion, base: Candidate, nodes: list[str]
    ) -> tuple[Candidate, CalibratedModel]:
        """The candidate with these nodes promoted, and the calibrated model that it is made of."""
        label = f"{base.label}, {len(nodes)} nodes {promotion.label}"
        self.progress(label)
        plan = promotion.plan(self.calibrated.model, base.plan, nodes)
        refitted = self.calibrated.refitted_to(plan)
        candidate = self.bench.judge(refitted.build(plan, label))
        self.candidates.append(candidate)
        self.trials.append(Trial(label, plan, candidate))
        return candidate, refitted

    def seems_enough(self, promotion: Promotion, candidate: Candidate) -> bool:
        """Whether the accuracy to go by while groups are counted satisfies the contract."""
        if promotion.by_agreement:
            return is_expected_to_satisfy(candidate, self.accuracy, self.candidates)
        return satisfies(candidate, self.accuracy)

    def is_enough(self, promotion: Promotion, candidate: Candidate) -> bool:
        """Whether both the expected and the measured accuracy satisfy the contract."""
        is_expected = self.seems_enough(promotion, candidate)
        return is_expected and satisfies(candidate, self.accuracy)

    def ranked_by_time(
        self, promotion: Promotion, base: Candidate, nodes: list[str], calibrated: CalibratedModel
    ) -> Groups:
        """Groups by what `base` gains per millisecond if one alone is promoted.

        Beside others in float, integers would seem to save nothing: they pay for conversions.
        """
        groups = _grouped(nodes, promotion.max_groups)
        gains = []
        for group in groups:
            if self.bench.is_out_of_time:
                break
            self.progress(f"measuring what {group[0]} {promotion.label} gains")
            plan = promotion.plan(self.calibrated.model, base.plan, group)
            one = self.bench.judge(calibrated.build(plan, base.label))
            price = _milliseconds(base, one)
            if price is None:
                price = _elements(base.plan, group)
            gains.append(self._gain(base, one, price))
        return _best_first(groups, gains)

    def ranked_by_bytes(
        self,
        promotion: Promotion,
        base: Candidate,
        nodes: list[str],
        full: Candidate,
        calibrated: CalibratedModel,
    ) -> Groups:
        """Groups by what `full`, where all are promoted, loses if one alone is not, per weight.

        Beside others in 4 bits, which were rounded to make up for its errors, promoting one alone
        would seem to gain nothing.
        """
        groups = _grouped(nodes, promotion.max_groups)
        gains = []
        for group in groups:
            if self.bench.is_out_of_time:
                break
            self.progress(f"measuring what {group[0]} {promotion.label} gains")
            others = [node for node in nodes if node not in group]
            plan = promotion.plan(self.calibrated.model, base.plan, others)
            without = self.bench.judge_fidelity(calibrated.build(plan, base.label))
            gains.append(self._gain(without, full, _elements(full.plan, group)))
        return _best_first(groups, gains)

    def _gain(self, before: Candidate, after: Candidate, price: float) -> tuple[float, float]:
        """Noise that goes per price; behind it what the metric gains, as integers have no noise."""
        value = contract_value(after, self.accuracy) - contract_value(before, self.accuracy)
        return (before.noise - after.noise) / price, value

    def fewest(
        self, promotion: Promotion, base: Candidate, ranked: Groups, full: Candidate
    ) -> Candidate:
        """The candidate with the fewest groups promoted that is enough; `full` has all of them."""
        made = {len(ranked): full}
        low, high = 0, len(ranked)
        while high - low > 1 and not self.bench.is_out_of_time:
            middle = (low + high) // 2
            made[middle], _ = self.attempt(promotion, base, _joined(ranked[:middle]))
            if self.seems_enough(promotion, made[middle]):
                high = middle
            else:
                low = middle
        width = 1
        while high < len(ranked) and not self.is_enough(promotion, made[high]):
            high, width = min(high + width, len(ranked)), 2 * width
            if high not in made:
                made[high], _ = self.attempt(promotion, base, _joined(ranked[:high]))
        return made[high]


def _grouped(nodes: Sequence[str], most: int) -> Groups:
    """The nodes in at most `most` groups of neighbours, of nearly equal size."""
    if not nodes:
        return []
    parts = np.array_split(np.array(nodes, object), min(len(nodes), most))
    return [list(part) for part in parts]


def _best_first(groups: Groups, gains: Sequence[float] | Sequence[tuple[float, float]]) -> Groups:
    """The groups, the largest gain first; those that gain the same stay in graph order.

    Groups whose gain was not measured, because time was over, are left out.
    """
    order = sorted(range(len(gains)), key=lambda i: gains[i], reverse=True)
    return [groups[i] for i in order]


def _joined(groups: Groups) -> list[str]:
    return [node for group in groups for node in group]


def _milliseconds(before: Candidate, after: Candidate) -> float | None:
    """How much longer the promoted candidate takes; None if it cannot be timed."""
    if before.cost is None or after.cost is None:
        return None
    least = POLICY.least_price_share * before.cost.quantized_ms
    return max(after.cost.quantized_ms - before.cost.quantized_ms, least)


def _elements(plan: QuantPlan, nodes: Collection[str]) -> float:
    """How many weights these nodes have."""
    return float(sum(n.elements for n in plan.nodes if n.node in nodes))

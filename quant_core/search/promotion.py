"""More bits, or float, for the fewest nodes that give a candidate the accuracy of a contract."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir

from quant_core.config import Contract
from quant_core.errors import ModelError
from quant_core.metrics import MAX_SQNR_DB
from quant_core.plan.make import with_choice
from quant_core.plan.types import (
    IN_FLOAT,
    IN_FLOAT16,
    IN_FLOAT32,
    IN_INT8,
    NodeChoice,
    NodePlan,
    QuantPlan,
    Storage,
)
from quant_core.search.assignments import Groups, float_groups, nodes_of
from quant_core.search.bench import Bench
from quant_core.search.calibrated import CalibratedModel
from quant_core.search.candidate import (
    Candidate,
    contract_value,
    is_expected_to_satisfy,
    satisfies,
    satisfying,
)
from quant_core.search.choose import of_most_worth
from quant_core.search.policy import POLICY
from quant_core.search.variants import Trial
from quant_core.text import counted


@dataclass(frozen=True, slots=True)
class Promotion:
    """One way to give accuracy back.

    label         for people
    choice        how each promoted node computes and is stored
    concerns      which nodes with weights can be promoted
    max_groups    in how many groups they are ranked at most, where their price is bytes
    takes_time    whether their price is time: then minimum cuts rank them
    by_agreement  whether the number of groups is searched by the agreement that is to be expected,
                  because rounding the others anew makes the measured one jump
    """

    label: str
    choice: NodeChoice
    concerns: Callable[[NodePlan], bool]
    max_groups: int = 0
    takes_time: bool = False
    by_agreement: bool = False

    def nodes_of(self, plan: QuantPlan) -> list[str]:
        """The nodes of the plan that can be promoted, in graph order."""
        return [n.node for n in plan.weighted if self.concerns(n)]

    def plan(self, model: ir.Model, plan: QuantPlan, nodes: Collection[str]) -> QuantPlan:
        """The plan with these nodes promoted."""
        return with_choice(model, plan, nodes, self.choice)


TO_8_BITS = Promotion(
    "in 8 bits",
    IN_INT8,
    lambda n: n.storage is Storage.INT4,
    POLICY.int8_groups,
    by_agreement=True,
)
TO_FLOAT = Promotion(
    "in float", IN_FLOAT, lambda n: n.is_rounded and n.compute.is_integer, takes_time=True
)
TO_16_BITS = Promotion("in 16 bits", IN_FLOAT16, lambda n: n.is_rounded, POLICY.float16_groups)
TO_32_BITS = Promotion(
    "in 32 bits", IN_FLOAT32, lambda n: n.storage is Storage.FLOAT16, POLICY.float16_groups
)
# in the order in which they are tried
PROMOTIONS = (TO_8_BITS, TO_FLOAT, TO_16_BITS, TO_32_BITS)


@dataclass(frozen=True, slots=True, eq=False)
class Promoted:
    """The best candidate, and the trials that led to it."""

    best: Candidate
    trials: tuple[Trial, ...]


def promote(
    calibrated: CalibratedModel, start: Candidate, bench: Bench, contract: Contract
) -> Promoted:
    """The candidate that satisfies the contract's accuracy with the fewest nodes promoted.

    If none does, it is the one with the best value of the contract's metric.

    1. One of PROMOTIONS after the other: the next only where all nodes by this one are not enough.
       Where all in float were not, but the weights of some in 16 bits are, others need not stay in
       float.
    2. Nodes in groups: which gain the most per weight, or per millisecond?
    3. How many groups, best first, are enough? Bisection. What stays in 4 bits is rounded anew
       each time, as it made up for errors that are gone.
    4. While there are 4 bits to promote, bisection goes by the agreement that is to be expected;
       what it finds must satisfy the contract both as expected and as measured.
    5. If what was found is slower than float, and other candidates that satisfy the contract are
       not, the one of most worth among these. Not in 4 bits, which are for the fewest bytes.
    """
    accuracy = replace(contract, min_speedup=None, max_size_ratio=None)
    work = _Work(calibrated, bench, accuracy, [start])
    try:
        enough = work.fewest_of_all()
    except ModelError as error:  # one that does not load is no reason to lose the others
        last = work.candidates[-1]
        work.trials.append(Trial(f"more than {last.label}", last.plan, error))
        enough = None
    if enough is None:
        usable = satisfying(work.candidates, accuracy) or work.candidates
        enough = max(usable, key=lambda c: contract_value(c, contract))
    if not (enough.keeps_speed or start.plan.in_four_bits):
        fast = [c for c in satisfying(work.candidates, contract) if c.keeps_speed]
        sure = [c for c in fast if is_expected_to_satisfy(c, accuracy, work.candidates)]
        enough = of_most_worth(sure) if sure else enough
    return Promoted(enough, tuple(work.trials))


@dataclass(frozen=True, slots=True)
class _Work:
    """What `promote` works with, and what it has tried so far.

    candidates  the start, and what the trials made
    """

    calibrated: CalibratedModel
    bench: Bench
    accuracy: Contract
    candidates: list[Candidate]
    trials: list[Trial] = field(default_factory=list)

    def fewest_of_all(self) -> Candidate | None:
        """The candidate with the fewest nodes promoted, by the first promotion that is enough."""
        base, calibrated = self.candidates[0], self.calibrated
        in_integers = None  # the base before all of its nodes computed in float
        for promotion in PROMOTIONS:
            nodes = promotion.nodes_of(base.plan)
            if not nodes:
                continue
            full, refitted = self.attempt(promotion, base, nodes)
            if self.is_enough(promotion, full):
                if not self.bench.has_time_after(self.candidates, POLICY.trials_of_a_step):
                    return full
                if promotion.takes_time:
                    ranked = float_groups(calibrated, base, self.bench)
                else:
                    ranked = self.ranked_by_bytes(promotion, base, nodes, full, refitted)
                found = self.fewest(promotion, base, ranked, full)
                if in_integers is None or promotion is TO_32_BITS:
                    return found
                return self.fewest_in_float(found, in_integers)
            if satisfying(self.candidates, self.accuracy):
                return None
            in_integers = base if promotion.takes_time else in_integers
            base, calibrated = full, refitted
        return None

    def fewest_in_float(self, found: Candidate, in_integers: Candidate) -> Candidate:
        """The candidate with the fewest nodes in float that is enough; in `found` all are.

        Its weights in 16 bits are those of `found`, all else is as in `in_integers`.
        """
        has_time = self.bench.has_time_after(self.candidates, POLICY.trials_of_a_step)
        if not has_time or in_integers.gain <= found.gain:
            return found
        rounded = {n.node for n in found.plan.nodes if n.is_rounded}
        wide = [n for n in TO_16_BITS.nodes_of(in_integers.plan) if n not in rounded]
        base, calibrated = self.attempt(TO_16_BITS, in_integers, wide)
        if self.is_enough(TO_16_BITS, base):
            return base
        ranked = float_groups(calibrated, base, self.bench)
        return self.fewest(TO_FLOAT, base, ranked, found)

    def attempt(
        self, promotion: Promotion, base: Candidate, nodes: list[str]
    ) -> tuple[Candidate, CalibratedModel]:
        """The candidate with these nodes promoted, and the calibrated model that it is made of."""
        label = f"{base.label}, {counted(len(nodes), 'node')} {promotion.label}"
        self.bench.progress(label)
        began_at = time.monotonic()
        plan = promotion.plan(self.calibrated.model, base.plan, nodes)
        refitted = self.calibrated.refitted_to(plan, self.bench.deadline)
        candidate = self.bench.judge(refitted.build(plan, label))
        candidate = replace(candidate, seconds=time.monotonic() - began_at)
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
        bench = self.bench
        if full.sqnr_db < MAX_SQNR_DB:  # noise tells; decisions alone take many samples
            bench = bench.for_ranking()
        if bench is not self.bench:
            full = bench.judge_fidelity(full)
        gains = []
        for group in groups:
            if not self.bench.has_time_after(self.candidates):
                break
            self.bench.progress(f"measuring what {group[0]} {promotion.label} gains")
            others = [node for node in nodes if node not in group]
            plan = promotion.plan(self.calibrated.model, base.plan, others)
            without = bench.judge_fidelity(calibrated.build(plan, base.label))
            gains.append(self._gain(without, full, _elements(full.plan, group)))
        return _best_first(groups, gains)

    def _gain(self, before: Candidate, after: Candidate, price: float) -> tuple[float, float]:
        """The noise that goes away for the price, then what the metric gains: outputs that are
        integers have no noise to compare.
        """
        value = contract_value(after, self.accuracy) - contract_value(before, self.accuracy)
        return (before.noise - after.noise) / price, value

    def fewest(
        self, promotion: Promotion, base: Candidate, ranked: Groups, full: Candidate
    ) -> Candidate:
        """The candidate with the fewest groups promoted that is enough; `full` has all of them."""
        made = {len(ranked): full}
        low, high = 0, len(ranked)
        while high - low > 1 and self.bench.has_time_after(self.candidates):
            middle = (low + high) // 2
            made[middle], _ = self.attempt(promotion, base, nodes_of(ranked[:middle]))
            if self.seems_enough(promotion, made[middle]):
                high = middle
            else:
                low = middle
        width = 1
        while high < len(ranked) and not self.is_enough(promotion, made[high]):
            next_high = high + width if self.bench.has_time_after(self.candidates) else len(ranked)
            high, width = min(next_high, len(ranked)), 2 * width
            if high not in made:
                made[high], _ = self.attempt(promotion, base, nodes_of(ranked[:high]))
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


def _elements(plan: QuantPlan, nodes: Collection[str]) -> float:
    """How many weights these nodes have."""
    return float(sum(n.elements for n in plan.nodes if n.node in nodes))

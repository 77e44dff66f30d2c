"""The search for the best plan: a bounded loop over plan, rewrite and compare.

Theory of operation. A search turns a calibrated float model into a `Found`, in five steps:

1. Race (`race_variants`). With `mode: auto` the rows of VARIANTS are tried one after the other:
   each makes a plan, the plan a model, and the bench judges its fidelity, size and speed. Any other
   mode is one variant. Where static outputs are not exact, the float model is cross-layer
   equalized; if that makes them more exact, all from there on is made of the equalized model. The
   last resorts among VARIANTS come after step 3, where nothing is good enough until then.
2. Single MatMuls (`try_single_matmuls`). With `mode: auto` each MatMul of the best candidate is
   timed by itself, in each way that does not spoil the outputs where all take it. If the cheapest
   ways together save time, they make one more candidate.
3. Assignments (`try_assignments`). Of the nodes of the fastest candidate some compute in float, so
   that time + price * noise is least (minimum_cut.py). Each assignment is one more candidate. They
   are tried where the best is not faithful, or where the whole front is asked for; with a contract
   that is the fastest one, as what it needs besides is promoted in step 4.
4. Selection. Without a contract the candidate of the highest rank wins: it is sound, gains speed
   with no output below POLICY.noted_db, or does one of the two, and is of most worth: speed, less
   what the lost fidelity must buy. Of those that are as fast as this one, the nearest to float
   wins. If all have outputs below, however slow, more bits for the weights of the best are tried
   too. With a contract
   (`select_by_contract`) the candidate of most worth that satisfies it wins. Where a faster one
   misses it, or none satisfies it, the nodes that cost the most accuracy are promoted to more bits
   or to float (mixed_precision.py). If none satisfies the contract in the end, the best candidate
   is returned all the same, with verdict `not_met`.
5. Biases (`tune_biases`). The biases of what wins are corrected empirically, unless that breaks the
   contract.

All end where there is no time for another trial that takes as long as the longest before it. A
search that begins late begins with what only stores its weights in fewer bits, and one that has
found nothing sound in time ends with that (`try_safest`).

Between steps goes a `Race`, a value: what was tried, and the model that further candidates are made
of. A variant whose model does not load is a failed trial; the search ends with an error only if all
fail. `follow_plan` takes the place of all where a plan is given, or nothing can be judged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from quant_core.calibrate.outliers import choose_treatments
from quant_core.config import Contract
from quant_core.errors import ModelError
from quant_core.evaluate.contract import Verdict
from quant_core.evaluate.timing_cache import Cost
from quant_core.plan.make import replan
from quant_core.plan.types import Compute, NodeChoice, OutlierTreatment, QuantPlan
from quant_core.search import mixed_precision
from quant_core.search.calibrated import CalibratedModel
from quant_core.search.candidate import Bench, Candidate, satisfies, satisfying, verdict
from quant_core.search.choose import best_of, fastest_of, of_most_worth
from quant_core.search.kernel_times import without_losses
from quant_core.search.matmul_costs import matmul_costs
from quant_core.search.policy import POLICY
from quant_core.search.variants import (
    VARIANTS,
    Trial,
    Variant,
    candidates_of,
    is_matmul,
    was_tried,
    worth_trying,
)

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """The best candidate, the model that it is made of, whether it satisfies the contract, and why.

    verdict  met, not_met, or none without a contract
    trace    one row for each trial, in order
    """

    best: Candidate
    calibrated: CalibratedModel
    verdict: Verdict
    reason: str
    trace: list[dict[str, Any]]


@dataclass(frozen=True, slots=True, eq=False)
class Race:
    """The state of a search between two steps.

    calibrated    what further candidates are made of
    trials        what competes, and what failed
    trace         a row for each trial, also of those that no longer compete
    equalized_db  what cross-layer equalization gained, 0 if the model is not equalized
    """

    calibrated: CalibratedModel
    trials: tuple[Trial, ...] = ()
    trace: tuple[dict[str, Any], ...] = ()
    equalized_db: float = 0.0

    @property
    def candidates(self) -> list[Candidate]:
        """The candidates that compete."""
        return candidates_of(self.trials)

    def after(self, *trials: Trial) -> Race:
        """The race with these trials, which compete."""
        return replace(self, trials=(*self.trials, *trials)).traced(*trials)

    def traced(self, *trials: Trial) -> Race:
        """The race with rows for these trials, which do not compete."""
        return replace(self, trace=(*self.trace, *(t.row() for t in trials)))


def search(
    calibrated: CalibratedModel,
    plan: QuantPlan,
    bench: Bench,
    contract: Contract | None = None,
    *,
    whole_front: bool = False,
    progress: Progress = lambda _: None,
) -> Found:
    """The best model that can be made of a calibrated one, in the five steps described above.

    plan         covers all that may compute statically; its config says what may be varied
    whole_front  whether all assignments are tried, not only those that may win

    Raises: ModelError if no variant makes a model that runs.
    """
    race = Race(calibrated)
    if bench.deadline.is_past(POLICY.late):
        race = try_safest(race, plan, bench, progress)
    race = race_variants(race, plan, bench, contract, progress)
    if race.candidates:
        if plan.config.mode == "auto" and bench.has_time_after(race.candidates):
            race = try_single_matmuls(race, bench, progress)
        race = try_assignments(race, bench, contract, progress, whole_front=whole_front)
    if plan.config.mode == "auto":
        race = race_variants(race, plan, bench, contract, progress, last_resorts=True)
    if not any(candidate.is_sound for candidate in race.candidates):
        race = try_safest(race, plan, bench, progress)
    if not race.candidates:
        raise _last_error(race.trials)
    if contract is None:
        race = try_more_bits(race, bench, progress)
        best = best_of(race.candidates)
    else:
        best, race = select_by_contract(race, bench, contract, progress)
    best, race = tune_biases(best, race, bench, contract, progress)
    outcome = (Verdict.NONE, "no contract") if contract is None else verdict(best, contract)
    best = replace(best, plan=replace(best.plan, equalized_db=race.equalized_db))
    return Found(best, race.calibrated, *outcome, list(race.trace))


def follow_plan(
    calibrated: CalibratedModel,
    plan: QuantPlan,
    bench: Bench | None,
    contract: Contract | None = None,
) -> Found:
    """What this very plan makes; it is judged only if there is a contract and a bench."""
    best = calibrated.with_tuned_biases(calibrated.build(plan, "the plan"))
    if bench is None or contract is None:
        return Found(best, calibrated, Verdict.NONE, "no contract", [])
    best = bench.judge(best)
    return Found(best, calibrated, *verdict(best, contract), [best.row()])


def race_variants(
    race: Race,
    plan: QuantPlan,
    bench: Bench,
    contract: Contract | None,
    progress: Progress,
    *,
    last_resorts: bool = False,
) -> Race:
    """Step 1: the race after all variants that are worth trying; or after the last resorts."""
    if plan.config.mode != "auto":
        return _try_as_planned(race, plan, bench, progress)
    is_calibrated = race.calibrated.stats is not None
    uncalibrated = filter(None, (variant.without_calibration() for variant in VARIANTS))
    for variant in VARIANTS if is_calibrated else uncalibrated:
        if variant.is_last_resort is not last_resorts:
            continue
        # Weights that are only stored are built faster than all else.
        is_second = all(trial.variant is VARIANTS[-1] for trial in race.trials)
        trials = POLICY.trials_of_a_step if is_second else 1.0
        if race.candidates and not bench.has_time_after(race.candidates, trials):
            break
        variant_plan = _planned(variant, race, plan, bench)
        if not worth_trying(variant, variant_plan, race.trials, contract):
            continue
        if variant.treats_outliers:
            progress("measuring what treating outliers gains")
            treatments = _outlier_treatments(race.calibrated, plan, bench)
            variant_plan = _planned(variant, race, plan, bench, treatments)
            if was_tried(variant_plan, race.trials):
                continue
        progress(f"trying {variant.label}")
        race = _try_plan(race, variant_plan, variant.label, bench, variant)
        if variant.equalizes:
            race = _try_equalized(race, plan, bench, progress)
    return race


def try_safest(race: Race, plan: QuantPlan, bench: Bench, progress: Progress) -> Race:
    """The race with the last of the last resorts, if any way is allowed: it takes least to build,
    and breaks an output least.
    """
    safest = VARIANTS[-1]
    if plan.config.mode != "auto":
        return race
    safest_plan = safest.plan(race.calibrated.model, plan)
    if was_tried(safest_plan, race.trials):
        return race
    progress(f"trying {safest.label}")
    return _try_plan(race, safest_plan, safest.label, bench, safest)


def try_single_matmuls(race: Race, bench: Bench, progress: Progress) -> Race:
    """Step 2: the race with one candidate more, if MatMuls save time in their cheapest ways."""
    progress("timing single MatMuls")
    best = best_of(race.candidates)
    try:
        plan, count = _cheapest_computes(race, best, bench)
    except ModelError as error:
        return race.after(Trial("single MatMuls by their own cost", best.plan, error))
    if not count:
        return race
    label = f"{best.label}, {count} MatMuls by their own cost"
    return _try_plan(race, plan, label, bench)


def try_assignments(
    race: Race,
    bench: Bench,
    contract: Contract | None,
    progress: Progress,
    *,
    whole_front: bool = False,
) -> Race:
    """Step 3: the race with assignments of the fastest candidate's nodes to float and integers."""
    start = fastest_of(race.candidates)
    is_open = (best_of(race.candidates) if contract is None else start).sqnr_db < POLICY.faithful_db
    is_open = is_open and any(n.weights and n.compute.is_integer for n in start.plan.nodes)
    has_time = bench.has_time_after(race.candidates, POLICY.trials_of_a_step)
    if not has_time or not (is_open or whole_front):
        return race
    counts = mixed_precision.counts_until_worse
    if whole_front:
        counts = mixed_precision.every_count
    elif contract is not None:
        counts = mixed_precision.fastest_count
    trials = mixed_precision.try_assignments(race.calibrated, start, bench, progress, counts)
    return race.after(*trials)


def try_more_bits(race: Race, bench: Bench, progress: Progress) -> Race:
    """Step 4 without a contract: the race with the fewest nodes of the best promoted, if none is
    above the aim; and with what is faster on the way there, and no larger.
    """
    best = best_of(race.candidates)
    has_time = bench.has_time_after(race.candidates)
    if not has_time or any(c.is_above(c.aim) for c in race.candidates):
        return race
    promoted = mixed_precision.promote(race.calibrated, best, bench, best.aim, progress)
    competing: list[Trial] = []
    others: list[Trial] = []
    for trial in promoted.trials:
        is_small = any(c.size_bytes <= promoted.best.size_bytes for c in candidates_of([trial]))
        (competing if is_small else others).append(trial)
    return race.traced(*others).after(*competing)


def select_by_contract(
    race: Race, bench: Bench, contract: Contract, progress: Progress
) -> tuple[Candidate, Race]:
    """Step 4 with a contract: the candidate of most worth that satisfies it, else the best for it.

    1. Candidates that satisfy the contract are options. If some only miss its size or speed, which
       promoting nodes makes worse, they are, or the smallest of them is.
    2. A candidate that misses the accuracy but is clearly faster than all options is promoted until
       it satisfies it.
    """
    candidates = race.candidates
    options = satisfying(candidates, contract)
    accurate = satisfying(candidates, replace(contract, min_speedup=None, max_size_ratio=None))
    if accurate and not options:  # 1
        smallest = min(accurate, key=lambda c: c.size_bytes)
        options = [smallest] if contract.max_size_ratio else accurate
    least = max((c.gain for c in options), default=-math.inf) + POLICY.promotion_gain
    inaccurate = [c for c in candidates if c not in accurate and c.metric_failure is None]
    faster = [c for c in inaccurate if c.gain > least]
    if faster and bench.has_time_after(candidates):  # 2
        start = of_most_worth(faster)
        promoted = mixed_precision.promote(race.calibrated, start, bench, contract, progress)
        options, race = [*options, promoted.best], race.traced(*promoted.trials)
    return of_most_worth(satisfying(options, contract) or options or candidates), race


def tune_biases(
    best: Candidate, race: Race, bench: Bench, contract: Contract | None, progress: Progress
) -> tuple[Candidate, Race]:
    """Step 5: the best candidate with tuned biases.

    It stays as it is if there is nothing to gain, or if that would break the contract.
    """
    if not bench.has_time_after([best], POLICY.trials_of_a_step):
        return best, race
    progress("tuning biases")
    quantized = race.calibrated.tune_biases(best)
    if quantized is None:
        return best, race
    label = f"{best.label}, biases tuned"
    tuned = bench.judge_fidelity(replace(best, label=label, quantized=quantized))
    race = race.traced(Trial(label, best.plan, tuned))
    if contract is None:
        return tuned, race
    breaks = satisfies(best, contract) and not satisfies(tuned, contract)
    return (best if breaks else tuned), race


def _planned(
    variant: Variant,
    race: Race,
    plan: QuantPlan,
    bench: Bench,
    treatments: Mapping[str, OutlierTreatment] | None = None,
) -> QuantPlan:
    """The variant's plan; where it cannot be timed, without what is known to be slower there."""
    model = race.calibrated.model
    found = variant.plan(model, plan, treatments)
    return found if bench.is_host else without_losses(model, found, bench.samples[0])


def _try_as_planned(race: Race, plan: QuantPlan, bench: Bench, progress: Progress) -> Race:
    """The race after the plan as it is; a static one may become more exact by equalization."""
    label = plan.config.mode
    progress(f"trying {label}")
    race = _try_plan(race, plan, label, bench)
    is_static = plan.config.mode == "static"
    return _try_equalized(race, plan, bench, progress) if is_static else race


def _try_plan(
    race: Race, plan: QuantPlan, label: str, bench: Bench, variant: Variant | None = None
) -> Race:
    """The race with a trial of this plan, which fails if its model does not load."""
    outcome: Candidate | ModelError
    try:
        outcome = bench.judge(race.calibrated.build(plan, label))
    except ModelError as error:
        outcome = error
    return race.after(Trial(label, plan, outcome, variant))


def _try_equalized(race: Race, plan: QuantPlan, bench: Bench, progress: Progress) -> Race:
    """The race with its last candidate made of the equalized model, if that is more exact."""
    last = race.trials[-1]
    before = last.candidate
    if before is None or before.sqnr_db >= POLICY.exact_db:
        return race
    if not bench.has_time_after(race.candidates, POLICY.trials_of_a_step):
        return race
    progress("equalizing channels")
    equalized = race.calibrated.equalized(plan, bench.deadline)
    if equalized is None:
        return race
    label = f"{before.label}, equalized"
    built = equalized.build(last.plan, label)
    if len(equalized.model.graph) == len(race.calibrated.model.graph):
        candidate = bench.judge_fidelity(replace(built, cost=before.cost))
    else:  # inputs of products are multiplied
        candidate = bench.judge(built)
    trial = replace(last, label=label, outcome=candidate)
    gain_db = candidate.sqnr_db - before.sqnr_db
    race = race.traced(trial)
    if gain_db <= POLICY.equalization_gain_db:
        return race
    return Race(equalized, (*race.trials[:-1], trial), race.trace, gain_db)


def _outlier_treatments(
    calibrated: CalibratedModel, plan: QuantPlan, bench: Bench
) -> Mapping[str, OutlierTreatment]:
    """Tensor -> how its outliers are best treated, for what the MatMuls of the plan read."""
    if calibrated.stats is None:
        return {}
    matmuls = [n.node for n in plan.nodes if is_matmul(n) and n.compute.is_integer]
    return choose_treatments(calibrated.model, matmuls, calibrated.stats.means, bench.samples)


def _cheapest_computes(race: Race, best: Candidate, bench: Bench) -> tuple[QuantPlan, int]:
    """The best plan with each MatMul in the way that costs least by itself, and how many change.

    None changes if there are few MatMuls, or all that change save no more than noise.
    """
    weighted = [n for n in best.plan.nodes if n.weights]
    matmuls = [n.node for n in weighted if is_matmul(n)]
    if best.cost is None or len(matmuls) < POLICY.rare_share * len(weighted):
        return best.plan, 0
    now = {n.node: n.compute for n in weighted}
    model = race.calibrated.model
    base = replace(best.plan, outliers=_outliers_for(best, race.trials))
    open_ways = [dict.fromkeys(matmuls, compute) for compute in open_computes(race.trials, best)]
    plans = [_computing(race, base, now | way) for way in ({}, *open_ways)]
    costs = matmul_costs(model, plans, race.calibrated.stats, bench.samples[0], bench.costs)
    changed = {node: _cheaper(now[node], of_node) for node, of_node in costs.items()}
    changed = {node: compute for node, compute in changed.items() if compute is not now[node]}
    saved_ms = sum(_saved_ms(costs[node], now[node], to) for node, to in changed.items())
    if saved_ms <= (1 - POLICY.equal_speed) * best.cost.quantized_ms:
        return best.plan, 0
    return _computing(race, base, now | changed), len(changed)


def open_computes(trials: Iterable[Trial], best: Candidate) -> list[Compute]:
    """The ways that are open to single MatMuls: float, and those faithful if all take them.

    What counts is how MatMuls compute in a trial, whatever was done to its model besides.
    """
    faithful = {trial.variant.matmul for trial, _ in _faithful(trials, best) if trial.variant}
    return [compute for compute in Compute if compute is Compute.FLOAT or compute in faithful]


def _faithful(trials: Iterable[Trial], best: Candidate) -> list[tuple[Trial, Candidate]]:
    """The trials whose outputs are faithful, or as near to float's as those of the best."""
    least = min(POLICY.faithful_db, best.sqnr_db)
    judged = [(trial, trial.candidate) for trial in trials]
    return [(t, c) for t, c in judged if c is not None and c.sqnr_db >= least]


def _outliers_for(best: Candidate, trials: Sequence[Trial]) -> Mapping[str, OutlierTreatment]:
    """How outliers are treated where a MatMul becomes dynamic: as in the faithful dynamic trial."""
    if best.plan.outliers:
        return best.plan.outliers
    for trial, candidate in _faithful(trials, best):
        if trial.variant is not None and trial.variant.matmul is Compute.DYNAMIC:
            return candidate.plan.outliers
    return {}


def _cheaper(now: Compute, costs: Mapping[Compute, Cost]) -> Compute:
    """The way with the largest speed-up by itself, if it beats the one now by more than noise."""
    fastest = max(costs, key=lambda compute: costs[compute].speedup)
    is_faster = costs[fastest].speedup * POLICY.equal_speed > costs[now].speedup
    return fastest if is_faster else now


def _saved_ms(costs: Mapping[Compute, Cost], now: Compute, then: Compute) -> float:
    """Milliseconds that a MatMul saves, both speed-ups being over the same float time."""
    return costs[then].float_ms / costs[now].speedup - costs[then].quantized_ms


def _computing(race: Race, plan: QuantPlan, computes: Mapping[str, Compute]) -> QuantPlan:
    """The plan with these nodes computing in these ways."""
    choices = {node: NodeChoice(compute) for node, compute in computes.items()}
    return replan(race.calibrated.model, plan, choices)


def _last_error(trials: Sequence[Trial]) -> ModelError:
    errors = [t.outcome for t in trials if isinstance(t.outcome, ModelError)]
    return errors[-1]

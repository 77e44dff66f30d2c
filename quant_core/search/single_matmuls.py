"""Step 2 of a search: each MatMul of the best candidate in the way that costs least by itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from quant_core.errors import ModelError
from quant_core.evaluate.timing_cache import Cost
from quant_core.plan.make import replan
from quant_core.plan.types import Compute, NodeChoice, OutlierTreatment, QuantPlan
from quant_core.search.bench import Bench
from quant_core.search.candidate import Candidate
from quant_core.search.choose import best_of
from quant_core.search.matmul_costs import matmul_costs
from quant_core.search.policy import POLICY
from quant_core.search.race import Race
from quant_core.search.race_variants import try_plan
from quant_core.search.variants import Trial, is_matmul


def try_single_matmuls(race: Race, bench: Bench) -> Race:
    """Step 2: the race with one candidate more, if MatMuls save time in their cheapest ways."""
    bench.progress("timing single MatMuls")
    best = best_of(race.candidates)
    try:
        plan, count = _cheapest_computes(race, best, bench)
    except ModelError as error:
        return race.after(Trial("single MatMuls by their own cost", best.plan, error))
    if not count:
        return race
    label = f"{best.label}, {count} MatMuls by their own cost"
    return try_plan(race, plan, label, bench)


def _cheapest_computes(race: Race, best: Candidate, bench: Bench) -> tuple[QuantPlan, int]:
    """The best plan with each MatMul in the way that costs least by itself, and how many change.

    None changes if there are few MatMuls, or all that change save no more than noise.
    """
    weighted = best.plan.weighted
    matmuls = [n.node for n in weighted if is_matmul(n)]
    if best.cost is None or len(matmuls) < POLICY.rare_share * len(weighted):
        return best.plan, 0
    now = {n.node: n.compute for n in weighted}
    model = race.calibrated.model
    base = replace(best.plan, outliers=_outliers_for(best, race.trials))
    open_ways = [dict.fromkeys(matmuls, compute) for compute in open_computes(race.trials, best)]
    plans = [_computing(race, base, now | way) for way in ({}, *open_ways)]
    # which integers a kernel multiplies does not change its time: GPTQ would be for nothing
    stats = (race.calibrated.unfitted() or race.calibrated).stats
    costs = matmul_costs(model, plans, stats, bench.samples[0], bench.costs)
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

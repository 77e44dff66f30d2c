"""The search for the best plan: a bounded loop over plan, rewrite and compare.

Theory of operation. A search turns a calibrated float model into a `Found`, in five steps:

1. Race (`race_variants`). With `mode: auto` the rows of VARIANTS are tried one after the other:
   each makes a plan, the plan a model, and the bench judges its fidelity, size and speed. Any other
   mode is one variant. Where static outputs are not exact, and not too slow to win, the float model
   is cross-layer equalized; if that makes them more exact, all from there on is made of the
   equalized model. The last resorts among VARIANTS come after step 3, where nothing is good enough
   until then. Where integers cannot gain (possible_gain.py), weights are only stored:
   where there are samples, the first plan says so.
2. Single MatMuls (`try_single_matmuls`). With `mode: auto` each MatMul of the best candidate is
   timed by itself, in each way that does not spoil the outputs where all take it. If the cheapest
   ways together save time, they make one more candidate.
3. Assignments (`try_assignments`). Of the nodes of the fastest candidate some compute in float, so
   that time + price * noise is least (minimum_cut.py). Each assignment is one more candidate. They
   are tried where the best is not faithful, or where the whole front is asked for; with a contract,
   or a faithful model in another runtime, that is the fastest one, as what a contract needs besides
   is promoted in step 4.
4. Selection. Without a contract the candidate of the highest rank wins: it is sound, gains speed
   with no output below POLICY.noted_db, or else has none below and is no slower than float, and is
   of most worth: speed, less what the lost fidelity must buy. Of those that are as fast as this
   one, the nearest to float wins. Second races confirm its speed. If all have outputs below,
   however slow, more bits for the weights of the best are tried too.
   With a contract (`select_by_contract`) the candidate of most worth that satisfies it wins.
   Where a faster one misses it, or none satisfies it, the nodes that cost the most accuracy are
   promoted to more bits or to float (promotion.py). If none satisfies the contract in the end, the
   best candidate is returned all the same, with verdict `not_met`. A least value that float itself
   does not reach is not sought, unless a variant has it: `reachable`.
5. Biases (`tune_biases`, which the pipeline calls once ranges are those of all samples). The biases
   of what wins are corrected empirically, where that brings outputs nearer to float's and keeps the
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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from quant_core.config import Contract, Mode
from quant_core.errors import ModelError
from quant_core.evaluate.contract import NO_CONTRACT, Ruling, float_misses
from quant_core.evaluate.timing_cache import Cost
from quant_core.plan.targets import Runtime
from quant_core.plan.types import QuantPlan
from quant_core.search.assignments import try_assignments
from quant_core.search.bench import Bench
from quant_core.search.calibrated import CalibratedModel
from quant_core.search.candidate import Candidate, ruling, satisfies, satisfying
from quant_core.search.choose import best_of, of_most_worth
from quant_core.search.policy import POLICY
from quant_core.search.possible_gain import can_gain, most_gain
from quant_core.search.promotion import promote
from quant_core.search.race import Race
from quant_core.search.race_variants import race_variants, try_safest
from quant_core.search.single_matmuls import try_single_matmuls
from quant_core.search.trace import TrialRow
from quant_core.search.variants import Trial, candidates_of


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """The best candidate, the model that it is made of, and whether it satisfies the contract.

    trace  one row for each trial, in order
    """

    best: Candidate
    calibrated: CalibratedModel
    ruling: Ruling
    trace: list[TrialRow]

    @property
    def seconds(self) -> float:
        """The seconds that it took to calibrate the model and to make the best candidate."""
        return self.calibrated.seconds + self.calibrated.weights.seconds + self.best.seconds


def search(
    calibrated: CalibratedModel,
    plan: QuantPlan,
    bench: Bench,
    contract: Contract | None = None,
    *,
    whole_front: bool = False,
) -> Found:
    """The best model that can be made of a calibrated one, in steps 1 to 4 described above.

    plan         covers all that may compute statically; its config says what may be varied
    whole_front  whether all assignments are tried, not only those that may win

    Raises: ModelError if no variant makes a model that runs.
    """
    race = Race(calibrated)
    is_late = bench.deadline.is_past(POLICY.late)
    if is_late:
        race = try_safest(race, plan, bench)
    sought, is_auto = contract, plan.config.mode == Mode.AUTO
    is_free = is_auto and contract is None and not whole_front
    if _may_gain(calibrated, plan, bench, is_profiled=is_free and not is_late):
        race = race_variants(race, plan, bench, contract)
        sought = None if contract is None else reachable(contract, race.candidates)
        if race.candidates:
            in_onnxruntime = bench.timed_in is Runtime.ONNXRUNTIME
            if is_auto and in_onnxruntime and bench.has_time_after(race.candidates):
                race = try_single_matmuls(race, bench)
            race = try_assignments(race, bench, sought, whole_front=whole_front)
        if is_auto:
            race = race_variants(race, plan, bench, sought, last_resorts=True)
    if not any(candidate.is_sound for candidate in race.candidates):
        race = try_safest(race, plan, bench)
    if not race.candidates:
        raise _last_error(race.trials)
    if sought is None:
        race = try_more_bits(race, bench)
        best, race = confirmed_best(race, bench)
    else:
        best, race = select_by_contract(race, bench, sought)
    best = replace(best, plan=replace(best.plan, equalized_db=race.equalized_db))
    return Found(best, race.calibrated, ruling(best, contract), list(race.trace))


def _may_gain(
    calibrated: CalibratedModel, plan: QuantPlan, bench: Bench, *, is_profiled: bool
) -> bool:
    """Whether integers may make the model faster. With samples the first plan says so.

    is_profiled  whether a profile says so without samples; else it is taken for granted
    """
    if plan.rounding_samples:
        return False
    if calibrated.stats is not None or not is_profiled:
        return True
    original, feed = bench.reference.path, bench.samples[0]
    return can_gain(most_gain(calibrated.model, plan, original, feed, bench.costs))


def follow_plan(
    calibrated: CalibratedModel,
    plan: QuantPlan,
    bench: Bench | None,
    contract: Contract | None = None,
) -> Found:
    """What this very plan makes; it is judged only if there is a contract and a bench."""
    best = calibrated.with_planned_biases(calibrated.build(plan, "the plan"))
    if bench is None or contract is None:
        return Found(best, calibrated, NO_CONTRACT, [])
    best = bench.judge(best)
    return Found(best, calibrated, ruling(best, contract), [best.row()])


def reachable(contract: Contract, candidates: Sequence[Candidate]) -> Contract | None:
    """The contract without a least value that neither float itself nor a candidate has; None if it
    promises nothing else.
    """
    judged = [c.fidelity for c in candidates if c.fidelity is not None and not c.metric_failure]
    if satisfying(candidates, contract) or not any(float_misses(f, contract) for f in judged):
        return contract
    others = (contract.max_drop, contract.min_speedup, contract.max_size_ratio)
    return None if others == (None, None, None) else replace(contract, min=-math.inf)


def try_more_bits(race: Race, bench: Bench) -> Race:
    """Step 4 without a contract: the race with the fewest nodes of the best promoted, if none is
    above the aim; and with what is faster on the way there, and no larger.
    """
    best = best_of(race.candidates)
    has_time = bench.has_time_after(race.candidates)
    if not has_time or any(c.is_above(c.aim) for c in race.candidates):
        return race
    promoted = promote(race.calibrated, best, bench, best.aim)
    competing: list[Trial] = []
    others: list[Trial] = []
    for trial in promoted.trials:
        is_small = any(c.size_bytes <= promoted.best.size_bytes for c in candidates_of([trial]))
        (competing if is_small else others).append(trial)
    return race.traced(*others).after(*competing)


def confirmed_best(race: Race, bench: Bench) -> tuple[Candidate, Race]:
    """The best candidate after second races, as one of many is lucky or unlucky in the first.

    1. If the best is below the aim or slower than float, the best of those above the aim that
       seemed slower than float is raced again; its faster race counts.
    2. The best is raced again, and its slower race counts, until the best has been raced twice.
    """
    best, raced_again = best_of(race.candidates), set[str]()
    slow = [c for c in race.candidates if c.is_above(c.aim) and not c.keeps_speed]
    is_good = best.is_above(best.aim) and best.keeps_speed
    if slow and not is_good and bench.has_time_after(race.candidates):
        race = _raced_again(race, of_most_worth(slow), bench, max)
        best = best_of(race.candidates)
    has_rivals = len(race.candidates) > 1
    while has_rivals and best.label not in raced_again and bench.has_time_after(race.candidates):
        raced_again.add(best.label)
        race = _raced_again(race, best, bench, min)
        best = best_of(race.candidates)
    return best, race


def _raced_again(
    race: Race, candidate: Candidate, bench: Bench, choose: Callable[..., Cost | None]
) -> Race:
    """The race with that one of the costs of the candidate in two races."""
    costs = filter(None, (candidate.cost, bench.time(candidate, "again")))
    return race.with_cost(candidate, choose(costs, key=lambda cost: cost.speedup, default=None))


def select_by_contract(race: Race, bench: Bench, contract: Contract) -> tuple[Candidate, Race]:
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
        promoted = promote(race.calibrated, start, bench, contract)
        options, race = [*options, promoted.best], race.traced(*promoted.trials)
    return of_most_worth(satisfying(options, contract) or options or candidates), race


def tune_biases(found: Found, bench: Bench, contract: Contract | None) -> Found:
    """Step 5: what was found with tuned biases.

    They stay as they are if outputs come no nearer to float's, or if that would break the contract.
    """
    best = found.best
    if best.plan.in_four_bits or not bench.has_time_after([best], POLICY.trials_of_a_step):
        return found
    if best.fidelity is None:
        best = bench.judge_fidelity(best)
        found = replace(found, best=best)
    if best.sqnr_db >= POLICY.exact_db:
        return found
    bench.progress("tuning biases")
    quantized = found.calibrated.tune_biases(best)
    if quantized is None:
        return found
    label = f"{best.label}, biases tuned"
    tuned = bench.judge_fidelity(replace(best, label=label, quantized=quantized))
    found = replace(found, trace=[*found.trace, tuned.row()])
    gain_db = tuned.sqnr_db - best.sqnr_db
    sought = None if contract is None else reachable(contract, [best])
    breaks = sought is not None and satisfies(best, sought) and not satisfies(tuned, sought)
    if gain_db <= 0 or breaks:
        return found
    tuned = replace(tuned, plan=replace(best.plan, tuned_biases_db=gain_db))
    return Found(tuned, found.calibrated, ruling(tuned, contract), found.trace)


def _last_error(trials: Sequence[Trial]) -> ModelError:
    errors = [t.outcome for t in trials if isinstance(t.outcome, ModelError)]
    return errors[-1]

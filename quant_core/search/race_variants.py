"""Step 1 of a search: the rows of VARIANTS one after the other, where each is worth a trial."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from quant_core.calibrate.outliers import choose_treatments
from quant_core.config import Contract, Mode
from quant_core.errors import ModelError
from quant_core.plan.operators import is_dynamic_product
from quant_core.plan.targets import Runtime
from quant_core.plan.types import Compute, OutlierTreatment, QuantPlan
from quant_core.search.bench import Bench
from quant_core.search.calibrated import CalibratedModel
from quant_core.search.candidate import Candidate
from quant_core.search.kernel_times import without_losses
from quant_core.search.policy import POLICY
from quant_core.search.race import Race
from quant_core.search.variants import (
    VARIANTS,
    Trial,
    Variant,
    may_be_worth_trying,
    was_tried,
    worth_of_usable,
    worth_trying,
)


def race_variants(
    race: Race,
    plan: QuantPlan,
    bench: Bench,
    contract: Contract | None,
    *,
    last_resorts: bool = False,
) -> Race:
    """Step 1: the race after all variants that are worth trying; or after the last resorts."""
    if plan.config.mode != Mode.AUTO:
        return _try_as_planned(race, plan, bench)
    is_calibrated = race.calibrated.stats is not None
    uncalibrated = filter(None, (variant.without_calibration() for variant in VARIANTS))
    for variant in VARIANTS if is_calibrated else uncalibrated:
        if variant.is_last_resort is not last_resorts:
            continue
        # What 1x1 Convs gain as dynamic products only a race tells.
        if variant.pointwise is not None and bench.timed_in is not Runtime.ONNXRUNTIME:
            continue
        if not may_be_worth_trying(variant, plan, race.trials, contract):
            continue
        # Weights that are only stored are built faster than all else.
        is_second = all(trial.variant is VARIANTS[-1] for trial in race.trials)
        trials = POLICY.trials_of_a_step if is_second else 1.0
        if race.candidates and not bench.has_time_after(race.candidates, trials):
            break
        variant_plan = _planned(variant, race, plan, bench)
        if not worth_trying(variant, variant_plan, race.trials):
            continue
        if variant.treats_outliers:
            bench.progress("measuring what treating outliers gains")
            treatments = _outlier_treatments(race.calibrated, variant_plan, bench)
            variant_plan = _planned(variant, race, plan, bench, treatments)
            if was_tried(variant_plan, race.trials):
                continue
        bench.progress(f"trying {variant.label}")
        if variant.matmul is Compute.BLOCKS:
            race = _try_blocks(race, variant, variant_plan, bench, contract)
        else:
            race = try_plan(race, variant_plan, variant.label, bench, variant)
        if variant.equalizes:
            race = _try_equalized(race, plan, bench)
    return race


def try_safest(race: Race, plan: QuantPlan, bench: Bench) -> Race:
    """The race with the last of the last resorts, if any way is allowed: it takes least to build,
    and breaks an output least.
    """
    safest = VARIANTS[-1]
    if plan.config.mode != Mode.AUTO:
        return race
    safest_plan = safest.plan(race.calibrated.model, plan)
    if was_tried(safest_plan, race.trials):
        return race
    bench.progress(f"trying {safest.label}")
    return try_plan(race, safest_plan, safest.label, bench, safest)


def try_plan(
    race: Race, plan: QuantPlan, label: str, bench: Bench, variant: Variant | None = None
) -> Race:
    """The race with a trial of this plan, which fails if its model does not load."""
    return race.after(_trial(race.calibrated, plan, label, bench, variant))


def _trial(
    calibrated: CalibratedModel,
    plan: QuantPlan,
    label: str,
    bench: Bench,
    variant: Variant | None,
) -> Trial:
    outcome: Candidate | ModelError
    try:
        outcome = bench.judge(calibrated.build(plan, label))
    except ModelError as error:
        outcome = error
    return Trial(label, plan, outcome, variant)


def _try_blocks(
    race: Race, variant: Variant, plan: QuantPlan, bench: Bench, contract: Contract | None
) -> Race:
    """The race with a trial of blocks.

    Their integers are not those of the variants before, and GPTQ takes long. So they are rounded to
    nearest first, and by GPTQ only if they are not too slow to win, however exact they become.
    """
    unfitted = race.calibrated.unfitted()
    least = worth_of_usable(race.trials, contract)
    if unfitted is not None and least > 0:
        label = f"{variant.label}, rounded to nearest"
        rough = _trial(unfitted, plan, label, bench, variant)
        gain = -math.inf if rough.candidate is None else rough.candidate.gain
        if gain < least - POLICY.clock_noise:
            return race.after(rough)
    return try_plan(race, plan, variant.label, bench, variant)


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
    if bench.timed_in is not None:
        return found
    return without_losses(model, found, bench.samples[0])


def _try_as_planned(race: Race, plan: QuantPlan, bench: Bench) -> Race:
    """The race after the plan as it is; a static one may become more exact by equalization."""
    label = plan.config.mode
    bench.progress(f"trying {label}")
    race = try_plan(race, plan, label, bench)
    is_static = plan.config.mode == Mode.STATIC
    return _try_equalized(race, plan, bench) if is_static else race


def _try_equalized(race: Race, plan: QuantPlan, bench: Bench) -> Race:
    """The race with its last candidate made of the equalized model, if that is more exact.

    Where the candidate is slower than float, it stays so. If weights that are only stored are good
    enough, they win, however exact it becomes.
    """
    last = race.trials[-1]
    before = last.candidate
    if before is None or before.sqnr_db >= POLICY.exact_db:
        return race
    if not bench.has_time_after(race.candidates, POLICY.trials_of_a_step):
        return race
    if not before.keeps_speed:
        race = try_safest(race, plan, bench)
        if max(c.worth for c in race.candidates) > POLICY.good_worth:
            return race
    bench.progress("equalizing channels")
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
    trials = tuple(trial if t is last else t for t in race.trials)
    return Race(equalized, trials, race.trace, gain_db)


def _outlier_treatments(
    calibrated: CalibratedModel, plan: QuantPlan, bench: Bench
) -> Mapping[str, OutlierTreatment]:
    """Tensor -> how its outliers are best treated, for what dynamic products of the plan read."""
    if calibrated.stats is None:
        return {}
    products = [n for n in plan.nodes if is_dynamic_product(n)]
    return choose_treatments(calibrated.model, products, calibrated.stats.means, bench.samples)

"""Cross-validation: how near weights in 4 bits are to float on samples they were not fitted to.

Where weights are fitted to all of a few samples, these and splices of them show less noise than
others do, 5 to 20 dB less. So some are held out, weights are rounded by the same plan for the rest,
and what is made so is judged by the former, part by part. The file itself is fitted to all, and
hardly worse than what is judged here.

Source: Stone 1974, Cross-Validatory Choice and Assessment of Statistical Predictions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from quant_core.data.samples import Samples
from quant_core.plan.types import QuantPlan
from quant_core.search.bench import Bench
from quant_core.search.calibrated import (
    CalibratedModel,
    calibrated_as_planned,
    remade,
    with_samples,
)
from quant_core.search.candidate import Candidate
from quant_core.search.floor import Checked, check_floor
from quant_core.search.floor_notes import close_to_floor, shortfall_of
from quant_core.search.job import QuantJob
from quant_core.search.judges import are_few_to_hold_out, bench_of, only_decides
from quant_core.search.policy import POLICY


@dataclass(frozen=True, slots=True, eq=False)
class Fold:
    """What the plan makes of a part of the samples, and those that were held out of it."""

    calibrated: CalibratedModel
    candidate: Candidate
    held_out: Samples


def cross_validate(job: QuantJob, checked: Checked, *, repairs: bool) -> Checked:
    """What was checked, with the fidelity of weights in 4 bits on samples they were not fitted to.

    repairs  whether nodes are promoted, as `check_floor` does, where that is below the floor
    """
    if checked.worst_db is None or not _are_fitted_to_all(job, checked.best.plan):
        return checked
    assert job.samples is not None
    job.progress("checking the outputs on samples that no weight is fitted to")
    parts = _parts(job.samples)
    held_out = job.samples.pick(np.concatenate([few for _, few in parts]))
    bench = bench_of(job, checked.best.plan, held_out)
    folds = [_fold(job, checked.best, *part) for part in parts]
    judged = _judged(checked.best, folds, bench)
    if not judged.is_sound:
        bench = bench.where_float_repeats()
        judged = _judged(checked.best, folds, bench)
    assert judged.fidelity is not None
    if any(o.is_reshaped for o in judged.fidelity.per_output):
        return checked
    for _ in parts if repairs else ():
        if judged.is_sound:
            break
        checked = _repaired(job, checked, folds)
        folds = [_fold(job, checked.best, *part) for part in parts]
        judged = _judged(checked.best, folds, bench)
    seen = replace(checked, fidelity=judged.fidelity)
    if seen.worst_db is None:
        return checked
    if not judged.is_sound:
        shortfall = shortfall_of(folds[0].calibrated, judged, folds[0].held_out)
        return replace(seen, shortfall=shortfall, close=())
    if checked.worst_db is not None and seen.worst_db >= checked.worst_db:
        return checked
    return replace(seen, close=close_to_floor(judged))


def _are_fitted_to_all(job: QuantJob, plan: QuantPlan) -> bool:
    """Whether weights in 4 bits are fitted to all samples that could judge, and these are few.

    Splices of many show the same noise as others do, within 1 dB. Not where the model only decides:
    it takes many samples to tell shares of decisions apart.
    """
    samples = job.samples
    if samples is None or job.stats is None or job.evaluation is not samples:
        return False
    is_fitted = plan.fits_four_bits and not plan.holdout
    are_few = are_few_to_hold_out(samples) and len(samples) >= POLICY.holdout
    is_judged = job.contract is None and not samples.are_random and not only_decides(job.model)
    return is_fitted and are_few and is_judged


def _parts(samples: Samples) -> list[tuple[NDArray[np.intp], NDArray[np.intp]]]:
    """Positions of samples to fit to, and of those that are held out: in as many parts as it takes
    that POLICY.drawn_samples judge in all, or all samples.

    Neighbours are held out together: those of one stream are hardly others.
    """
    step = POLICY.holdout
    count = min(step, math.ceil(POLICY.drawn_samples / (len(samples) // step)))
    places = np.arange(len(samples)) * step // len(samples)
    return [
        (np.flatnonzero(places != place), np.flatnonzero(places == place))
        for place in range(step - count, step)
    ]


def _judged(best: Candidate, folds: Sequence[Fold], bench: Bench) -> Candidate:
    """The candidate as all folds together are judged."""
    return bench.judge_together(best, [(f.candidate.model, f.held_out) for f in folds])


def _fold(
    job: QuantJob, best: Candidate, fitted: NDArray[np.intp], held_out: NDArray[np.intp]
) -> Fold:
    assert job.samples is not None
    anew = replace(job, fitted_stats=None)
    own = with_samples(anew, best.plan, job.samples.pick(fitted))
    calibrated = calibrated_as_planned(own, best.plan)
    return Fold(calibrated, remade(best, calibrated), job.samples.pick(held_out))


def _repaired(job: QuantJob, checked: Checked, folds: Sequence[Fold]) -> Checked:
    """What was checked, with the nodes promoted that a fold needs; the folds judge it anew."""
    plan = checked.best.plan
    found = (
        check_floor(fold.calibrated, fold.candidate, bench_of(job, plan, fold.held_out))
        for fold in folds
    )
    changed = next((c for c in found if c.best.plan != plan), None)
    if changed is None:
        return checked
    best = remade(changed.best, calibrated_as_planned(job, changed.best.plan))
    notes = tuple(dict.fromkeys((*checked.notes, *changed.notes)))
    trials = (*checked.trials, *changed.trials)
    return replace(checked, best=best, fidelity=None, notes=notes, trials=trials)

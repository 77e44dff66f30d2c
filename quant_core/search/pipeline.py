"""From a prepared model and its statistics to a file and a report: choose judges, search, write.

job    = QuantJob(...)                                     # what is quantized, and by what
made   = quantize_by_search(job) or quantize_by_plan(job)  # the model, and why it is as it is
result = write_result(made, output)                        # the file, and a row for each node
"""

from __future__ import annotations

from dataclasses import replace
from itertools import takewhile

from quant_core.data.samples import Samples
from quant_core.evaluate.contract import Ruling, Verdict
from quant_core.model.providers import find_provider
from quant_core.optimize.opened import OpenedModel
from quant_core.optimize.rules import TIMED
from quant_core.plan.targets import TARGETS
from quant_core.plan.types import QuantPlan
from quant_core.search.before_choices import made_before_choices
from quant_core.search.bench import Bench
from quant_core.search.bit_allocation import allocate_bits
from quant_core.search.calibrated import (
    CalibratedModel,
    calibrated_as_planned,
    calibrated_for,
    remade,
    with_samples,
)
from quant_core.search.candidate import Candidate
from quant_core.search.cross_validation import cross_validate
from quant_core.search.first_plan import first_plan, only_stored, storable_plan
from quant_core.search.floor import Checked, check_floor
from quant_core.search.job import QuantJob
from quant_core.search.judges import (
    Judging,
    choose_judges,
    floor_bench,
    hold_out_judges,
    holdout_step,
    needs_hold_out,
    search_bench,
)
from quant_core.search.not_larger import fits, not_larger
from quant_core.search.notes import (
    alike_note,
    bytes_note,
    float_weights_note,
    speed_note,
    stored_note,
    time_note,
    with_reasons,
)
from quant_core.search.observing import observed, observed_samples
from quant_core.search.policy import POLICY
from quant_core.search.prepared import prepare_as_planned
from quant_core.search.result import Made
from quant_core.search.search import Found, follow_plan, search, tune_biases
from quant_core.text import joined


def quantize_by_search(job: QuantJob) -> Made:
    """The best model that the job's config allows.

    Timed rewrites may take bytes that integers do not win back: where the file would be larger than
    its original, it is made of the model as it was before them.

    Raises: DataError if there is a contract and nothing to judge by, ModelError if nothing runs.
    """
    made = made_before_choices(job, _search)
    is_timed = any(change.rule in TIMED for change in job.plan.rewrites)
    if not is_timed or not _limits_size(job) or fits(made.best, job.float_size_bytes):
        return made
    return made_before_choices(_before_timed_rewrites(job), _search)


def _search(job: QuantJob) -> Made:
    """The best model that can be made of the job's.

    Samples that ranges were measured on, and weights fitted to, judge too kindly. Where no others
    are given, a part is held out to judge by, and what wins is finished with all samples: weights
    are rounded for them too where that costs no output its aim.
    """
    plan, why = storable_plan(job)
    holds_out = job.stats is not None and needs_hold_out(job, plan)
    judging = hold_out_judges(job) if holds_out else choose_judges(job)
    searched = job
    if judging.held_out is not None and judging.fitted is not None:
        searched = with_samples(job, plan, judging.fitted)
    if plan.in_four_bits and job.stats is not None:
        job.progress("measuring where 4 bits make noise")
        measured = CalibratedModel(job.model, searched.samples, searched.stats)
        plan = allocate_bits(measured, plan, job.stage_deadline)
    calibrated = calibrated_for(searched, plan)
    bench = search_bench(job, plan, judging)
    if bench is None:
        found = follow_plan(calibrated, plan, None)
    else:
        found = search(calibrated, plan, bench, job.contract, whole_front=job.whole_front)
        found = _finished(found, job, plan, bench, judging.held_out)
    return _made(job, judging, bench, found, why)


def quantize_by_plan(job: QuantJob) -> Made:
    """What the job's plan makes, and nothing else; it is judged if there is a contract.

    Raises: as `quantize_by_search`.
    """
    return made_before_choices(job, _follow)


def _follow(job: QuantJob) -> Made:
    """What the job's plan makes of its whole model."""
    plan, why = storable_plan(job)
    judging = choose_judges(job)
    calibrated = calibrated_as_planned(job, plan)
    bench = search_bench(job, plan, judging) if job.contract is not None else None
    found = follow_plan(calibrated, plan, bench, job.contract)
    return _made(job, judging, bench, found, why, repairs=False)


def _before_timed_rewrites(job: QuantJob) -> QuantJob:
    """The job with its model as it was before them, observed anew if it was observed."""
    exact = tuple(takewhile(lambda change: change.rule not in TIMED, job.plan.rewrites))
    model = prepare_as_planned(job.original, replace(job.plan, rewrites=exact), job.samples)
    plan = first_plan(model, job.plan.config, measured=job.stats is not None, rewrites=exact)
    if job.plan.rounding_samples:
        plan = only_stored(model, plan, job.plan.rounding_samples)
    plain = replace(job, model=model, plan=plan, stats=None, fitted_stats=None)
    return plain if job.stats is None else observed(plain)


def _limits_size(job: QuantJob) -> bool:
    """Whether bytes count for more than speed."""
    return job.contract is None or not job.contract.min_speedup


def _finished(
    found: Found, job: QuantJob, plan: QuantPlan, bench: Bench, held_out: Samples | None
) -> Found:
    """What was found, made of all samples and with tuned biases.

    plan      what the search began with
    held_out  the samples that what was found has not seen; None if it has seen all
    """
    if held_out is None:
        return tune_biases(found, bench, job.contract)
    if _is_worth_rounding_anew(job, plan, found):
        tuned = tune_biases(found, bench, job.contract)
        job.progress("rounding for all samples")
        anew = _rounded_anew(tuned, job, bench)
        if anew.best.is_above(anew.best.aim) or not tuned.best.is_above(tuned.best.aim):
            return anew
    job.progress("finishing with all samples")
    more = _with_more_samples(found, job, plan, held_out)
    return tune_biases(more, bench, job.contract)


def _is_worth_rounding_anew(job: QuantJob, plan: QuantPlan, found: Found) -> bool:
    """Whether weights are rounded again, for all samples of the job, and there is time for it.

    plan  what the search began with

    Three of four samples are as good as all to round weights in 8 bits for. Half of a few samples
    are not, nor are they for weights in 4 bits, or for those in 8 that a search in 4 ended with.
    """
    assert job.samples is not None
    needs_all = plan.in_four_bits or holdout_step(job.samples) < POLICY.holdout
    return bool(needs_all) and job.deadline.allows(found.seconds)


def _rounded_anew(found: Found, job: QuantJob, bench: Bench) -> Found:
    """What was found, with weights, ranges and biases of all samples of the job; judged again, as
    one decision that falls otherwise may cost all.
    """
    calibrated = calibrated_as_planned(job, found.best.plan)
    best = calibrated.with_planned_biases(remade(found.best, calibrated))
    return replace(found, best=bench.judge_fidelity(best), calibrated=calibrated)


def _with_more_samples(found: Found, job: QuantJob, plan: QuantPlan, held_out: Samples) -> Found:
    """What was found, with ranges of all samples of the job; weights stay as they are, and the plan
    says so. Where no byte of the model changes, it is judged already.
    """
    assert job.samples is not None
    assert job.stats is not None
    best = replace(found.best, plan=replace(found.best.plan, holdout=holdout_step(job.samples)))
    calibrated = found.calibrated.with_more_samples(job.samples, job.stats, held_out, plan)
    made = remade(best, calibrated)
    if not best.plan.activations and _digest(made) == _digest(best):
        made = replace(made, fidelity=best.fidelity)
    return replace(found, best=made, calibrated=calibrated)


def _digest(candidate: Candidate) -> str:
    return OpenedModel(candidate.model).digest()


def _made(
    job: QuantJob,
    judging: Judging,
    bench: Bench | None,
    found: Found,
    why: str,
    *,
    repairs: bool = True,
) -> Made:
    """The result of a job, checked on samples.

    why      4 bits become 8, where the search did that
    repairs  whether nodes may be promoted, and weights stored otherwise, to mend what is broken
    """
    is_cut_short = bench is not None and not bench.has_time_after([found.best])
    job.progress("checking the outputs")
    checking = floor_bench(job, found.best.plan, judging, bench)
    known = found if checking is bench else replace(found, best=replace(found.best, fidelity=None))
    checked = _checked(job, known, checking, repairs=repairs)
    broken = Ruling(Verdict.NOT_MET, checked.shortfall)
    best = replace(checked.best, plan=with_reasons(checked.best.plan, job.plan, why))
    notes = [
        found.best.fidelity.note if found.best.fidelity is not None else "",
        judging.note,
        alike_note(job.samples),
        bytes_note(job.samples, job.original),
        stored_note(job.plan, job.samples),
        time_note(
            job.samples and observed_samples(job.plan, job.samples),
            job.stats,
            judging.judges,
            bench,
            is_cut_short=is_cut_short,
        ),
        speed_note(best),
        TARGETS[best.plan.target].note,
        find_provider(best.plan.config.provider).note if job.stats is not None else "",
        *checked.notes,
        *checked.close,
        float_weights_note(found.calibrated.model, best.plan),
        *(f"{glob} matches no node and no weight" for glob in job.plan.idle_globs),
    ]
    return Made(
        job=job,
        best=best,
        float_model=found.calibrated.model,
        fidelity=checked.fidelity,
        unchecked=checking is None,
        shortfall=checked.shortfall,
        ruling=broken if checked.shortfall else found.ruling,
        note=joined(notes),
        trace=[*found.trace, *(trial.row() for trial in checked.trials)],
    )


def _checked(job: QuantJob, found: Found, bench: Bench | None, *, repairs: bool) -> Checked:
    """What was found after the check of its outputs, its file no larger than the original's."""
    calibrated, best = found.calibrated, found.best
    limits_size = repairs and _limits_size(job)
    if limits_size:
        best = not_larger(calibrated, best, job.float_size_bytes)
    checked = check_floor(calibrated, best, bench, contract=job.contract, repairs=repairs)
    if job.deadline.allows(POLICY.holdout * found.seconds):
        checked = cross_validate(job, checked, repairs=repairs)
    if not limits_size:
        return checked
    # weights that were promoted take more bytes
    return replace(checked, best=not_larger(calibrated, checked.best, job.float_size_bytes))

"""Which samples weights are fitted to, and which judge candidates and the finished file.

| without a contract | what judges candidates |
|---|---|
| evaluation samples | a few of these |
| no samples, or random ones for calibration | other random ones |
| 4 calibration samples or more | those held out of them; if these are few, splices of all too |
| 2 or 3 | all of them, and splices of them |
| 2 or more, for weights in 4 bits, which are fitted to all of them | splices of them |
| whole numbers alone as outputs | a few of the calibration samples |
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from quant_core.data.for_model import samples_for
from quant_core.data.samples import Samples, spread
from quant_core.data.spec import SampleSpec
from quant_core.errors import DataError, ModelError
from quant_core.evaluate.timing_cache import TimingCache
from quant_core.metrics import custom_metric_in
from quant_core.model import files
from quant_core.plan.types import QuantPlan
from quant_core.search.bench import Bench, Reference
from quant_core.search.job import QuantJob
from quant_core.search.one_run import affordable_samples, one_run
from quant_core.search.policy import POLICY
from quant_core.search.prepared import timed_in
from quant_core.text import counted, joined


@dataclass(frozen=True, slots=True, eq=False)
class Judging:
    """Which samples weights are fitted to, and which candidates are judged by.

    held_out  those that were split off the calibration samples to judge by, None if none were
    judges    the evaluation samples, or what stands in for them where there are none
    drawn     random ones where no sample is given: ways are timed on them, and the file checked
    note      what makes the judgement doubtful, "" if nothing
    """

    fitted: Samples | None
    judges: Samples | None
    held_out: Samples | None = None
    drawn: Samples | None = None
    note: str = ""


def choose_judges(job: QuantJob) -> Judging:
    """All calibration samples to fit to, and the evaluation samples to judge by.

    Where no labels and no contract need all of them, a few tell candidates apart.

    Raises: DataError if there is a contract and nothing to judge by.
    """
    if job.contract is not None and job.evaluation is None:
        raise DataError(
            "a contract needs samples to judge by",
            str(job.original),
            "Give evaluation or calibration data",
        )
    judges, note = job.evaluation, ""
    judged_by_calibration = _judges_by_calibration_samples(job)
    if judged_by_calibration:
        note = "the contract was judged by the samples that ranges were measured on"
    few_are_enough = job.contract is None or judged_by_calibration
    if judges is not None and judges.labels is None and few_are_enough:
        judges = judges.subsample(_enough_samples(job))
    drawn, why_not = _drawn_samples(job)
    if job.samples is not None:
        judges, drawn = drawn or judges, None
    if judges is not None and job.evaluation is job.samples:
        judges = _with_splices(job, judges)
    return Judging(job.samples, judges, drawn=drawn, note=joined([note, why_not]))


def hold_out_judges(job: QuantJob) -> Judging:
    """Some calibration samples to judge by, the others to measure and to fit."""
    assert job.samples is not None
    fitted, held_out = hold_out(job.samples)
    judges = held_out
    if judges.labels is None:
        judges = judges.subsample(_enough_samples(job))
    if job.contract is None:
        return Judging(fitted, _with_splices(job, judges), held_out)
    note = f"the contract was judged by {counted(len(judges), 'sample')} held out of calibration"
    return Judging(fitted, judges, held_out, note=note)


def stand_ins(original: Path, samples: Samples, costs: TimingCache) -> Samples:
    """Those of the calibration samples that a finished file is compared on where no others were
    given: as few as tell candidates apart, or fewer of a slow original, which runs on them in
    `POLICY.drawn_s` but for the first few; and first of all what may have been held out.

    costs  what was timed before, and what will be

    Raises: ModelError if the original does not run.
    """
    if len(samples) <= POLICY.few_judges:  # all, however slow it is
        return samples
    affordable = affordable_samples(one_run(original, samples[0], costs))
    count = min(max(affordable, POLICY.few_judges), POLICY.judging_samples)
    fitted, held_out = hold_out(samples)
    held_out = held_out.subsample(count)
    fitted = fitted.subsample(count - len(held_out))
    chosen = np.isin(samples.order, [*held_out.order, *fitted.order])
    return samples.pick(np.flatnonzero(chosen))


def needs_hold_out(job: QuantJob, plan: QuantPlan) -> bool:
    """Whether ranges were measured on the samples that would judge, and there are enough.

    With a contract, which is what they all are for, only where 4-bit weights are fitted to them.
    Not where the model only decides: it takes many samples to tell shares of decisions apart.
    """
    if job.samples is None or len(job.samples) < POLICY.least_held_out:
        return False
    if job.contract is not None:
        enough = len(job.samples) >= 2 * POLICY.holdout
        return plan.fits_four_bits and enough and _judges_by_calibration_samples(job)
    is_given = job.evaluation is job.samples and not job.samples.are_random
    return is_given and not plan.in_four_bits and not only_decides(job.model)


def search_bench(job: QuantJob, plan: QuantPlan, judging: Judging) -> Bench | None:
    """What judges candidates: on the judges, or on drawn samples where models can be built many
    times; None without either.
    """
    samples = judging.judges
    if samples is None and not files.is_large(job.model):
        samples = judging.drawn
    if samples is None:
        return None
    bench = _bench(job, plan, Reference.run(job.original, samples, job.stage_deadline))
    if samples.labels is None and job.contract is None:
        return bench
    metric = custom_metric_in(job.contract.metric) if job.contract is not None else None
    return replace(bench, metric=metric, judged_outputs=None)


def floor_bench(
    job: QuantJob, plan: QuantPlan, judging: Judging, bench: Bench | None
) -> Bench | None:
    """What checks the finished file, on given samples or on drawn ones; None if none fit.

    It is the bench of the search where labels and contracts do not make that one judge otherwise.
    """
    if bench is not None and bench.judged_outputs is not None:
        return bench
    if bench is not None:
        few = spread(POLICY.floor_samples, len(bench.samples))
        reference = bench.reference.pick(few)
        reference = replace(reference, samples=replace(reference.samples, labels=None))
    else:
        samples = judging.judges or job.samples or judging.drawn
        if samples is None:
            return None
        return bench_of(job, plan, samples.subsample(POLICY.floor_samples))
    return _bench(job, plan, reference)


def bench_of(job: QuantJob, plan: QuantPlan, samples: Samples) -> Bench:
    """What checks a finished file on these samples. Raises: as `Reference.run`."""
    samples = replace(samples, labels=None)
    return _bench(job, plan, Reference.run(job.original, samples, job.deadline))


def _bench(job: QuantJob, plan: QuantPlan, reference: Reference) -> Bench:
    """What judges candidates by the outputs that float repeats."""
    return Bench(
        reference,
        job.float_size_bytes,
        costs=job.costs,
        timed_in=timed_in(plan.target),
        deadline=job.deadline,
        judged_outputs=reference.steady,
        progress=job.progress,
    )


def holdout_step(samples: Samples) -> int:
    """One in how many of the calibration samples is held out: of few ones every second."""
    return 2 if are_few_to_hold_out(samples) else POLICY.holdout


def hold_out(samples: Samples) -> tuple[Samples, Samples]:
    """The calibration samples to fit to, and those that are held out of them."""
    return samples.split_holdout(holdout_step(samples))


def are_few_to_hold_out(samples: Samples) -> bool:
    """Whether one in POLICY.holdout of the samples are too few to judge by."""
    return len(samples) < POLICY.holdout * POLICY.drawn_samples


def _enough_samples(job: QuantJob) -> int:
    """How many samples without labels candidates are judged by."""
    return POLICY.judging_samples if job.contract is None else POLICY.contract_samples


def _judges_by_calibration_samples(job: QuantJob) -> bool:
    """Whether a contract is to be judged by the samples that ranges were measured on."""
    if job.contract is None or job.samples is None or job.evaluation is None:
        return False
    return job.evaluation.same_feeds(job.samples)


def _drawn_samples(job: QuantJob) -> tuple[Samples | None, str]:
    """Random samples to judge by that the original runs on, where no others are given, and why none
    fit. None of them is a calibration sample. None if there are others, a contract, or none fit.
    """
    if job.contract is not None or job.evaluation is not job.samples:
        return None, ""
    count = POLICY.most_drawn_samples
    if job.samples is not None:
        more = job.samples.drawn_next(count) if job.samples.are_random else None
    else:
        try:
            spec, sizes = SampleSpec(count=count), job.plan.config.fix_shape
            more = samples_for(job.original, spec, sizes=sizes)
        except (DataError, ModelError) as error:
            place = f"{error.where}: " if error.where != str(job.original) else ""
            return None, f"the original was not run: {place}{error.problem}"
    return None if more is None else _affordable(job, more), ""


def _with_splices(job: QuantJob, judges: Samples) -> Samples:
    """The judges with splices of samples beside them, or in their place.

    1. The judges alone where they are labelled, random, or of a contract, and where the model only
       decides: splices are nearer to ties than what it was trained for.
    2. Splices of the judges alone where 4-bit weights are fitted to all judges, which then show
       5 to 12 dB less noise than other samples do.
    3. A few judges, and splices of all samples: an error that is rare and large shows in none of a
       few samples, nor in splices of these alone.

    There are as many splices as the original runs on soon.
    """
    is_plain = judges.labels is None and job.contract is None and not judges.are_random
    if not is_plain or len(judges) < 2 or only_decides(job.model):
        return judges
    if job.plan.fits_four_bits:
        behind = len(judges) + np.arange(POLICY.most_drawn_samples)
        return _affordable(job, judges.spliced(behind[-1] + 1).pick(behind)) or judges
    if len(judges) >= POLICY.few_judges:
        return judges
    assert job.samples is not None
    own = np.flatnonzero(np.isin(job.samples.order, judges.order))
    behind = len(job.samples) + np.arange(POLICY.most_drawn_samples - len(own))
    spliced = job.samples.spliced(behind[-1] + 1).pick(np.concatenate([own, behind]))
    more = _affordable(job, spliced)
    return judges if more is None or len(more) < len(judges) else more


def only_decides(model: ir.Model) -> bool:
    """Whether all outputs are known to hold no floats, but classes."""
    types = [value.dtype for value in model.graph.outputs]
    return all(dtype is not None and not dtype.is_floating_point() for dtype in types)


def _affordable(job: QuantJob, samples: Samples) -> Samples | None:
    """The first of these samples: as many as the original runs on in `POLICY.drawn_s`, but
    no fewer than `POLICY.drawn_samples`; None if it does not run on the first.
    """
    try:
        cost = one_run(job.original, samples[0], job.costs)
    except ModelError:
        return None
    count = max(POLICY.drawn_samples, affordable_samples(cost))
    return samples.pick(np.arange(min(count, len(samples))))

"""The calibrated model of a job, or of a part of its samples."""

from __future__ import annotations

from dataclasses import replace

from quant_core.calibrate.observe import observe
from quant_core.data.samples import Samples
from quant_core.plan.types import QuantPlan
from quant_core.search.calibrated import CalibratedModel
from quant_core.search.candidate import Candidate
from quant_core.search.job import QuantJob
from quant_core.search.policy import POLICY


def with_samples(job: QuantJob, plan: QuantPlan, samples: Samples) -> QuantJob:
    """The job with these of its calibration samples alone."""
    stats = job.fitted_stats if plan is job.plan else None
    if stats is None:
        stats = observe(job.model, plan, job.deadline.of_stage(POLICY.stage_share).limit(samples))
    return replace(job, samples=samples, stats=stats)


def calibrated_for(job: QuantJob, plan: QuantPlan) -> CalibratedModel:
    """The model with what rounding the weights of this plan needs."""
    if job.stats is None:
        return CalibratedModel(job.model, deadline=job.deadline)
    job.progress("measuring how inputs vary together")
    fitted = None
    if plan.holdout and job.samples is not None:
        fitted, _ = job.samples.split_holdout(plan.holdout)
    calibrated = CalibratedModel(job.model, job.samples, job.stats, fitted, deadline=job.deadline)
    return calibrated.with_gram_matrices(plan, job.deadline.of_stage(POLICY.stage_share))


def calibrated_as_planned(job: QuantJob, plan: QuantPlan) -> CalibratedModel:
    """The same, equalized if the plan says so."""
    calibrated = calibrated_for(job, plan)
    if not plan.equalized_db:
        return calibrated
    return calibrated.equalized(plan, job.deadline) or calibrated


def remade(best: Candidate, calibrated: CalibratedModel) -> Candidate:
    """The candidate made of that model, which is not judged yet."""
    built = calibrated.build(best.plan, best.label)
    return replace(best, quantized=built.quantized, size_bytes=built.size_bytes, fidelity=None)

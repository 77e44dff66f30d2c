"""What calibration measures for a search: of samples to fit to, and of those that are held out.

Statistics merge exactly, so that no sample runs twice, on however many workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain

import numpy as np
import onnx_ir as ir

from quant_core.calibrate.gram import GramTally, bytes_of
from quant_core.calibrate.matmul_inputs import inputs_of_weights
from quant_core.calibrate.observe import Statistics, observe_each
from quant_core.data.samples import Samples, spread
from quant_core.deadline import Deadline
from quant_core.plan.types import QuantPlan
from quant_core.search.job import QuantJob
from quant_core.search.judges import are_few_to_hold_out, hold_out, needs_hold_out
from quant_core.search.policy import POLICY


def observed(job: QuantJob) -> QuantJob:
    """The job with the statistics of its samples. Raises: as `observe_each`."""
    assert job.samples is not None
    held_out = hold_out(job.samples)[1] if needs_hold_out(job, job.plan) else None
    samples = observed_samples(job.plan, job.samples)
    parts = observe_separately(job.model, job.plan, samples, job.stage_deadline, held_out)
    return with_statistics(job, [parts])


def observe_shard(
    model: ir.Model, plan: QuantPlan, samples: Samples, shard: tuple[int, int], deadline: Deadline
) -> list[Statistics]:
    """The statistics of one shard of the samples, as `observe_separately` separates them.

    Random samples judge nothing but a contract of weights in 4 bits: else none is held out.
    """
    may_judge = plan.fits_four_bits or not samples.are_random
    held_out = hold_out(samples)[1] if may_judge else None
    shared = observed_samples(plan, samples).shard(*shard)
    return observe_separately(model, plan, shared, deadline, held_out, shards=shard[1])


def observed_samples(plan: QuantPlan, samples: Samples) -> Samples:
    """The calibration samples that the plan needs: all of them, or where weights are only stored a
    few that do not judge.
    """
    needs_all = plan.rounding_samples in (0, POLICY.gram_samples)
    if needs_all or are_few_to_hold_out(samples):
        return samples
    return hold_out(samples)[0].subsample(plan.rounding_samples)


def observe_separately(
    model: ir.Model,
    plan: QuantPlan,
    samples: Samples,
    deadline: Deadline,
    held_out: Samples | None,
    shards: int = 1,
) -> list[Statistics]:
    """The statistics of those of the samples that weights are fitted to, and of those that are held
    out, so that none runs twice. The first have the Gram matrices that rounding needs, if these
    take little memory, and are of all samples.

    Raises: as `observe_each`.
    """
    is_held_out = np.isin(samples.order, [] if held_out is None else held_out.order)
    parts = [samples.pick(np.flatnonzero(is_part)) for is_part in (~is_held_out, is_held_out)]
    given = [deadline.limit(part) for part in parts if len(part)]
    if not given:
        return [Statistics(), Statistics()]
    grams = None
    if shards == 1 and plan.uses_gptq and not plan.in_four_bits:
        inputs = inputs_of_weights(model, plan)
        if bytes_of(inputs) <= POLICY.gram_bytes:
            grams = GramTally(inputs, spread(POLICY.gram_samples, len(parts[0])).tolist())
    seen = iter(observe_each(model, plan, given, grams=grams))
    return [next(seen) if len(part) else Statistics() for part in parts]


def with_statistics(job: QuantJob, shards: Sequence[Sequence[Statistics]]) -> QuantJob:
    """The job with what `observe_separately` found in each shard of its samples: statistics merge
    exactly. Where none are held out in the end, Gram matrices of three in four stand for all.
    """
    assert job.samples is not None
    stats = Statistics.merged(chain.from_iterable(shards))
    fitted = Statistics.merged(parts[0] for parts in shards)
    if not (are_few_to_hold_out(job.samples) or needs_hold_out(job, job.plan)):
        stats = replace(stats, gram_matrices=fitted.gram_matrices)
    return replace(job, stats=stats, fitted_stats=fitted)

"""A prepared float model with what calibration knows of it: every candidate is made of one."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass, field, replace

import onnx_ir as ir

from quant_core.calibrate.equalize import equalize
from quant_core.calibrate.gram import ScaledGrams, gram_matrices
from quant_core.calibrate.matmul_inputs import inputs_of_weights
from quant_core.calibrate.observe import Statistics, observe
from quant_core.calibrate.ranges import RangeCache
from quant_core.calibrate.scale_groups import product_groups
from quant_core.config import Mode
from quant_core.data.samples import Samples
from quant_core.deadline import NO_DEADLINE, Deadline
from quant_core.errors import ModelError
from quant_core.model import files, graph
from quant_core.plan.make import make_plan
from quant_core.plan.targets import TARGETS
from quant_core.plan.types import Compute, QuantPlan
from quant_core.rewrite.apply import Quantized, apply_plan
from quant_core.rewrite.sequential import round_sequentially
from quant_core.rewrite.weight_cache import WeightCache
from quant_core.search.candidate import Candidate
from quant_core.search.job import QuantJob
from quant_core.search.policy import POLICY
from quant_core.search.tune_biases import tune_biases


@dataclass(frozen=True, slots=True, eq=False)
class CalibratedModel:
    """A float model with its calibration samples and their statistics.

    samples and stats are both None without calibration.

    stats     what `observe` found in all samples, and what `with_gram_matrices` adds for rounding
    fitted    the samples that weights are rounded for, channels equalized and biases tuned; None
              for all
    scaled    the tensors whose channels equalization has scaled
    deadline  when all work on the model should end
    seconds   that it took to learn what rounding needs, without rounding
    """

    model: ir.Model
    samples: Samples | None = None
    stats: Statistics | None = None
    fitted: Samples | None = None
    scaled: Collection[str] = ()
    range_cache: RangeCache = field(default_factory=RangeCache)
    weights: WeightCache = field(default_factory=WeightCache)
    deadline: Deadline = NO_DEADLINE
    seconds: float = 0.0

    def with_gram_matrices(
        self, plan: QuantPlan, deadline: Deadline = NO_DEADLINE
    ) -> CalibratedModel:
        """This model with the Gram matrices, or rounding targets, that the weights of `plan` need.

        deadline  when it should end; weights without either are then rounded to nearest

        Without samples, or if the config rounds without GPTQ, it is returned as it is.
        """
        if self.samples is None or self.stats is None or not plan.uses_gptq:
            return self
        are_known = self.stats.gram_matrices and self.fitted is None and not plan.in_four_bits
        if are_known or deadline.is_over:
            return self
        count = plan.rounding_samples or POLICY.gram_samples
        few = (self.fitted or self.samples).subsample(count)
        observed = Statistics(self.stats.tensors, self.stats.means)
        weights = WeightCache()
        if plan.in_four_bits:
            try:
                rounded = round_sequentially(self.model, plan, observed, few, weights, deadline)
                return replace(self, stats=rounded, weights=weights)
            except ModelError:
                # A part that does not run by itself, as an operator on sequences: without targets.
                weights = WeightCache()
        matrices = gram_matrices(self.model, inputs_of_weights(self.model, plan), few, deadline)
        return replace(self, stats=replace(observed, gram_matrices=matrices), weights=weights)

    def refitted_to(self, plan: QuantPlan, deadline: Deadline) -> CalibratedModel:
        """This model with rounding targets for a plan with other bits; itself if it has none."""
        has_targets = self.stats is not None and bool(self.stats.rounding_targets)
        return self.with_gram_matrices(plan, deadline) if has_targets else self

    def unfitted(self) -> CalibratedModel | None:
        """This model with weights rounded to nearest, which takes a tenth of the time; None if they
        are anyway.
        """
        if self.stats is None or not (self.stats.gram_matrices or self.stats.rounding_targets):
            return None
        observed = replace(self.stats, gram_matrices={}, rounding_targets={})
        return replace(self, stats=observed, weights=WeightCache())

    def equalized(self, plan: QuantPlan, deadline: Deadline) -> CalibratedModel | None:
        """This model cross-layer equalized; None if no channel can be scaled, or in 4 bits.

        deadline  when it should end: then it has seen fewer samples

        Its Gram matrices are those of this model, scaled. Only the ranges of scaled tensors are
        measured anew: all others, and rounded weights, hold for both.
        """
        if self.samples is None or self.stats is None or plan.in_four_bits:
            return None
        few = (self.fitted or self.samples).subsample(POLICY.gram_samples)
        multiplied = self._multiplied_inputs(plan) if plan.config.mode == Mode.STATIC else []
        scaled = equalize(self.model, deadline.limit(few), multiplied)
        if scaled is None:
            return None
        model, factors = scaled
        observed = observe(model, _about(plan, factors), deadline.limit(self.samples))
        grams = ScaledGrams(self.stats.gram_matrices, inputs_of_weights(self.model, plan), factors)
        stats = replace(self.stats.updated(observed), gram_matrices=grams)
        return replace(self, model=model, stats=stats, scaled=factors.keys())

    def with_more_samples(
        self, samples: Samples, stats: Statistics, more: Samples, plan: QuantPlan
    ) -> CalibratedModel:
        """This model with the ranges and means of more samples than it is fitted to.

        samples  all of them
        stats    of all of them, before channels were equalized
        more     those of them that this model has not seen
        plan     what it was calibrated for

        Statistics merge exactly: they are those of a model that has seen all samples at once.
        """
        assert self.stats is not None
        found = replace(self.stats, tensors=stats.tensors, means=stats.means, samples=stats.samples)
        if self.scaled:
            seen = self.stats.of(self.scaled)
            others = observe(self.model, _about(plan, self.scaled), more)
            found = found.updated(Statistics.merged([seen, others]))
        return replace(self, samples=samples, stats=found, fitted=self.samples)

    def _multiplied_inputs(self, plan: QuantPlan) -> list[str]:
        """What float nodes write and static products alone read as integers.

        By the plan that the config makes, not by what a search made of that: the plan that it found
        makes the same model again.
        """
        first = make_plan(self.model, plan.config, TARGETS[plan.target], rewrites=plan.rewrites)
        static = {n.node for n in first.nodes if n.compute is Compute.STATIC}
        found = []
        for group in product_groups(self.model):
            (value,) = group.tensors
            writer = value.producer()
            own = {str(node.name) for node in group.readers}
            reading = static & {str(node.name) for node in graph.consumers(value)}
            if writer is not None and writer.name not in static and reading and reading <= own:
                found.append(group.name)
        return found

    def build(self, plan: QuantPlan, label: str) -> Candidate:
        """The candidate that a plan makes, not yet judged. Raises: as `apply_plan`."""
        began_at, rounded_s = time.monotonic(), self.weights.seconds
        quantized = apply_plan(
            self.model,
            plan,
            self.stats,
            ranges=self.range_cache,
            weights=self.weights,
            deadline=self.deadline.of_stage(POLICY.rounding_share),
        )
        size_bytes = files.size_in_file(quantized.model)
        seconds = time.monotonic() - began_at - (self.weights.seconds - rounded_s)
        return Candidate(label, plan, quantized, size_bytes, seconds=seconds)

    def tune_biases(self, candidate: Candidate) -> Quantized | None:
        """The candidate's model after empirical bias correction; None if it has no such biases.

        Biases of a plan with 4 bits make up already for what the layers before them leave.
        """
        plan = candidate.plan
        if self.samples is None or not plan.config.bias_correction or plan.in_four_bits:
            return None
        few = (self.fitted or self.samples).subsample(POLICY.bias_samples)
        return tune_biases(self.model, candidate.quantized, plan, few)

    def with_planned_biases(self, candidate: Candidate) -> Candidate:
        """The candidate with its biases tuned, if its plan says so; it is not judged anew."""
        tuned = self.tune_biases(candidate) if candidate.plan.tuned_biases_db else None
        return candidate if tuned is None else replace(candidate, quantized=tuned)


def with_samples(job: QuantJob, plan: QuantPlan, samples: Samples) -> QuantJob:
    """The job with these of its calibration samples alone."""
    stats = job.fitted_stats if plan is job.plan else None
    if stats is None:
        stats = observe(job.model, plan, job.stage_deadline.limit(samples))
    return replace(job, samples=samples, stats=stats)


def calibrated_for(job: QuantJob, plan: QuantPlan) -> CalibratedModel:
    """The model with what rounding the weights of this plan needs."""
    if job.stats is None:
        return CalibratedModel(job.model, deadline=job.deadline)
    job.progress("measuring how inputs vary together")
    began_at = time.monotonic()
    fitted = None
    if plan.holdout and job.samples is not None:
        fitted, _ = job.samples.split_holdout(plan.holdout)
    calibrated = CalibratedModel(job.model, job.samples, job.stats, fitted, deadline=job.deadline)
    calibrated = calibrated.with_gram_matrices(plan, job.stage_deadline)
    seconds = time.monotonic() - began_at - calibrated.weights.seconds
    return replace(calibrated, seconds=seconds)


def calibrated_as_planned(job: QuantJob, plan: QuantPlan) -> CalibratedModel:
    """As `calibrated_for`, of the equalized model if the plan says so."""
    calibrated = calibrated_for(job, plan)
    if not plan.equalized_db:
        return calibrated
    return calibrated.equalized(plan, job.deadline) or calibrated


def remade(best: Candidate, calibrated: CalibratedModel) -> Candidate:
    """The candidate made of that model, which is not judged yet."""
    built = calibrated.build(best.plan, best.label)
    return replace(best, quantized=built.quantized, size_bytes=built.size_bytes, fidelity=None)


def _about(plan: QuantPlan, tensors: Collection[str]) -> QuantPlan:
    """The plan, for `observe`, with statistics of these tensors alone."""
    return replace(
        plan,
        activations={t: source for t, source in plan.activations.items() if t in tensors},
        means={t: axes for t, axes in plan.means.items() if t in tensors},
    )

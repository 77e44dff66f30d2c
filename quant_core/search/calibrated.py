"""A prepared float model with what calibration knows of it: what every candidate is made of."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import onnx_ir as ir

from quant_core.calibrate.equalize import equalize
from quant_core.calibrate.gram import ScaledGrams, gram_matrices, matmul_inputs
from quant_core.calibrate.observe import Statistics, observe
from quant_core.calibrate.ranges import RangeCache
from quant_core.data.samples import Samples
from quant_core.errors import ModelError
from quant_core.model import files
from quant_core.numerics.weight_methods import WEIGHT_METHODS
from quant_core.plan.types import QuantPlan
from quant_core.rewrite.apply import Quantized, apply_plan
from quant_core.rewrite.rounding import WeightCache
from quant_core.rewrite.sequential import round_sequentially
from quant_core.search.candidate import Candidate
from quant_core.search.tune_biases import tune_biases

GRAM_FEEDS = 64  # more samples than that hardly change how inputs vary together


@dataclass(frozen=True, slots=True, eq=False)
class Material:
    """A model and the statistics of its tensors; without calibration neither samples nor statistics.

    feeds   the samples
    ranges  what `observe` found in all of them
    stats   the same, and what rounding must know of the inputs of each weight
    weights those that candidates were made of, rounded with these statistics
    """

    model: ir.Model
    feeds: Samples | None = None
    ranges: Statistics | None = None
    stats: Statistics | None = None
    range_cache: RangeCache = field(default_factory=RangeCache)
    weights: WeightCache = field(default_factory=WeightCache)

    def fitted(self, plan: QuantPlan) -> Material:
        """With what rounding the weights of this plan must know: how their inputs vary together."""
        if (
            self.feeds is None
            or self.ranges is None
            or not WEIGHT_METHODS[plan.config.weight_method].uses_gram
        ):
            return replace(self, stats=self.ranges)
        few, ranges = self.feeds.subsample(GRAM_FEEDS), self.ranges
        if plan.in_four_bits:
            weights = WeightCache()
            try:
                rounded = round_sequentially(self.model, plan, ranges, few, weights)
                return replace(self, stats=rounded, weights=weights)
            except ModelError:
                pass  # a part that does not run by itself: an operator between sequences, say
        found = gram_matrices(self.model, matmul_inputs(self.model, plan), few)
        stats = replace(ranges, gram_matrices=found)
        return replace(self, stats=stats, weights=WeightCache())

    def refitted(self, plan: QuantPlan) -> Material:
        """For a plan with other bits, where rounding a weight depends on those before it."""
        return self.fitted(plan) if self.stats is not None and self.stats.rounding_targets else self

    def evened(self, plan: QuantPlan) -> Material | None:
        """With channels evened out (equalize.py); None where none are free, or 4 bits cost more."""
        if self.feeds is None or self.stats is None or plan.in_four_bits:
            return None
        if (found := equalize(self.model, self.feeds.subsample(GRAM_FEEDS))) is None:
            return None
        model, grown = found
        ranges, sites = observe(model, plan, self.feeds), matmul_inputs(self.model, plan)
        return Material(
            model,
            self.feeds,
            ranges,
            replace(ranges, gram_matrices=ScaledGrams(self.stats.gram_matrices, sites, grown)),
        )

    def build(self, plan: QuantPlan, name: str) -> Candidate:
        """The candidate that a plan makes, not yet judged."""
        made = apply_plan(
            self.model, plan, self.stats, ranges=self.range_cache, weights=self.weights
        )
        return Candidate(name, plan, made, files.size_in_file(made.model))

    def settled(self, candidate: Candidate) -> Quantized | None:
        """The candidate's model with biases that bring it nearer to float (settle.py), if there are any.

        Biases beside 4 bits know already what the layers before them leave.
        """
        plan = candidate.plan
        if self.feeds is None or not plan.config.bias_correction or plan.in_four_bits:
            return None
        return tune_biases(self.model, candidate.quantized, plan, self.feeds.subsample(GRAM_FEEDS))

"""Every threshold of the search, in one place, with what it means and where it comes from."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SearchPolicy:
    """The thresholds of a search.

    Each comment names the command that shows what a change of the value does, or says that the
    value is not tuned. DIR is a folder of models with data, see the command's docstring.
    A doubling is log2 of a speed-up: 1.0 is twice as fast.
    """

    # --- how candidates are compared ---------------------------------------------------------
    # A model that takes at most 1 / equal_speed of float's time counts as equally fast: paired
    # medians of `evaluate.timing.measure` within 3 % are noise.
    # `python -m tests.bench.accuracy --zoo DIR`, column speed, two runs of one file.
    equal_speed: float = 0.97
    # Outputs with this SQNR count as equal to float's. `python -m tests.bench.accuracy --zoo DIR`:
    # decisions that differ from float's.
    faithful_db: float = 30.0
    # Doublings that the first 10 dB below faithful_db must buy; grows with the square of the
    # missing dB. `python -m tests.bench.accuracy --zoo DIR`: value and speed of what wins.
    doublings_per_10_db: float = 0.6
    # Doublings that half the bytes are worth among candidates of one grade. Not tuned: 7 %, twice
    # the noise of a race.
    doublings_per_half_size: float = 0.1
    # Doublings from which on a candidate is faster than float for the user, not only for the clock.
    # Not tuned: 15 %, five times the noise of a race.
    real_gain: float = 0.2
    # Doublings that are charged for each by which a model is slower than float and what counts as
    # equally fast. Not tuned: at half the speed more than any fidelity, at 4 % of noise nearly
    # nothing.
    slower_than_float: float = 10.0

    # --- what is tried -----------------------------------------------------------------------
    # Variants for MatMuls are tried if at least this share of the nodes with weights can compute
    # dynamically. Not tuned: saves search time.
    rare_share: float = 0.1
    # Worth, in doublings, above which last resorts are not tried. Not tuned: saves search time.
    good_worth: float = 0.2
    # Worth above which 1x1 Convs are not tried as dynamic products. Not tuned: saves search time
    # where Convs run in integers from end to end.
    static_convs_worth: float = 0.5
    # Doublings that one scale per weight can gain at most; kernels for few rows are some 10 %
    # faster with it. `python -m tests.bench.accuracy --zoo DIR`: speed of recurrent and language
    # models.
    per_tensor_gain: float = 0.3
    # Outputs with this SQNR need no equalization and no tuned biases: the noise is 1 % of the
    # signal's amplitude. Not tuned: saves search time.
    exact_db: float = 40.0
    # Equalization that gains less, in dB, counts as luck. `python -m tests.bench.accuracy --zoo
    # DIR`: SQNR of the vision models with and without.
    equalization_gain_db: float = 0.5

    # --- mixed precision ---------------------------------------------------------------------
    # Share of the bytes of uniform weights in 4 bits that may be added where noise is. `python -m
    # tests.bench.int4 --zoo DIR`: SQNR and size.
    allocated_share: float = 1 / 32
    # Groups of neighbouring nodes that are ranked, at most, for each promotion. Not tuned: they
    # bound how many models a search makes.
    int8_groups: int = 16
    float16_groups: int = 8
    # Weights in 8 bits that rounding leaves at a lower SQNR, in dB, are stored in 16 where their
    # node goes into float, which would keep much of its noise. `python -m tests.bench.accuracy
    # --zoo DIR`: SQNR and size of what has nodes in float.
    float_weights_db: float = 40.0
    # Samples on which the noise of single nodes is measured: as many as the float model runs on in
    # so many seconds, at most and at least so many. Not tuned: they rank nodes, no more.
    noise_samples: int = 8
    least_noise_samples: int = 2
    noise_s: float = 0.5
    # Doublings by which a candidate that misses its contract must be faster than all that satisfy
    # it, to be worth promoting. Not tuned: saves search time.
    promotion_gain: float = 0.2

    # --- samples -----------------------------------------------------------------------------
    # Samples on which promoting nodes, or a group of them, is measured: they rank these, no more.
    # Not tuned.
    ranking_samples: int = 16
    # Samples that the structure of a model is checked on after constants are folded. Not tuned.
    prepare_samples: int = 2
    # Samples for tuned biases. Not tuned: what is chance in the means of so few is left out.
    bias_samples: int = 16
    # Samples for Gram matrices and equalization. `python -m tests.bench.int4 --zoo
    # DIR --samples N`: agreement hardly changes with more.
    gram_samples: int = 64
    # The same where weights in 8 bits are only stored; more, up to as many, while the float model
    # runs on them in drawn_s. Not tuned: no range is measured on them.
    rounding_samples: int = 16
    # Bytes of Gram matrices that are summed up while ranges are measured; larger ones are left to a
    # run of their own, when the ranges are known. Not tuned: what most machines can spare.
    gram_bytes: int = 256 << 20
    # Samples that tell candidates apart where no labels and no contract need all, and the same
    # where there is a contract, but only calibration samples to judge it by. Not tuned.
    judging_samples: int = 32
    contract_samples: int = 64
    # One in so many calibration samples is held out to judge what is measured on the others and
    # fitted to them; of few samples every second, and none of fewer than these. Not tuned.
    holdout: int = 4
    least_held_out: int = 4
    # If fewer given samples judge, splices of them do too. Not tuned.
    few_judges: int = 16
    # Samples for the sensitivity of each node. Not tuned.
    sensitivity_samples: int = 2
    # Given samples on which a finished file is checked. Not tuned.
    floor_samples: int = 16
    # Random samples that judge: at least so many, and more, up to so many, while the float model
    # runs on them in so many seconds. Not tuned: few samples miss an error that is rare and large.
    drawn_samples: int = 8
    most_drawn_samples: int = 64
    drawn_s: float = 0.5
    # Samples on which float must repeat itself. Not tuned.
    steady_samples: int = 2

    # --- the finished file -------------------------------------------------------------------
    # An output below this SQNR, in dB, is worth a note: its noise is 10 % of its amplitude. A
    # search without a contract aims at outputs that are not.
    noted_db: float = 20.0

    # --- the time budget ---------------------------------------------------------------------
    # Seconds that a model may take by default, for each 100 MB of it or part of them. Not tuned:
    # what people wait for.
    budget_s: float = 180.0
    # Seconds of them that are gone when a model is read: a command has to import onnxruntime first.
    # Not tuned: `time quantmill info MODEL`.
    start_s: float = 2.0
    # Share of the budget that is kept for checking, writing and timing what a search found. Not
    # tuned: a trial of a large model takes some tenths of a short budget.
    finish_share: float = 0.15
    # Share of the time left that a stage before the search may take: rewriting, calibrating,
    # collecting Gram matrices, running the float model on the samples that candidates are judged
    # by. Not tuned: 40 % is left for the search.
    stage_share: float = 0.2
    # Share of the time left in which the weights of one candidate are rounded by GPTQ; those after
    # that are rounded to nearest. Not tuned: half is left for judging and writing it.
    rounding_share: float = 0.5
    # After this share of the budget it is late: calibrating is left out, and a search begins with
    # what is sound for sure. Not tuned.
    late: float = 0.4
    # A candidate is not timed where there is no time for so many runs: two of each model, and then
    # rounds of both. Not tuned.
    runs_of_a_race: float = 8.0
    # How many times as long as a trial a step takes that is no trial, and runs samples through both
    # models tensor by tensor; and the first trial of integers, over one whose weights are only
    # stored. Not tuned: two to six on models for images and text.
    trials_of_a_step: float = 4.0

    # --- seconds of one timing ---------------------------------------------------------------
    # A candidate against float, and a MatMul in one way against float. Not tuned: long enough for
    # paired medians of 3 %, as `python -m tests.bench.accuracy --zoo DIR` shows.
    race_seconds: float = 0.1
    # The same for a float model before and after a rewrite, whose gains are smaller.
    # `python -m tests.bench.optimize --zoo DIR`: the rules that are undone in two runs.
    rewrite_seconds: float = 0.3
    matmul_seconds: float = 0.01
    # All kernels of a model, for the times of its nodes. Not tuned: medians of a few runs.
    profile_seconds: float = 0.1

    @property
    def clock_noise(self) -> float:
        """`equal_speed` in doublings: what is slower by less counts as equally fast."""
        return -math.log2(self.equal_speed)


POLICY = SearchPolicy()

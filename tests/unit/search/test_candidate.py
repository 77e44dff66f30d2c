"""What candidates are compared by without a contract: sound, then fast and close, then of worth."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from quant_core.config import QuantConfig
from quant_core.evaluate.timing_cache import Cost
from quant_core.metrics import MAX_SQNR_DB, Fidelity, OutputFidelity
from quant_core.plan.types import Compute, NodePlan, QuantPlan, Storage
from quant_core.rewrite.apply import Quantized
from quant_core.search.candidate import Candidate


def candidate(
    sqnr_db: float | None,
    speedup: float | None,
    *nodes: NodePlan,
    flaw: str = "",
    floor_db: float | None = None,
    is_reshaped: bool = False,
) -> Candidate:
    """A candidate with one output, judged already; no model belongs to it."""
    of_output = {"sqnr_db": sqnr_db, "centred_db": sqnr_db, "lower_db": sqnr_db}
    output = OutputFidelity("y", flaw=flaw, is_reshaped=is_reshaped, **of_output)
    plan = QuantPlan(QuantConfig(floor_db=floor_db), "x86", nodes, {}, {})
    return Candidate(
        "",
        plan,
        Quantized(None, {}, {}, {}),
        size_bytes=1,
        fidelity=Fidelity((output,), 1, None, sqnr_db, None, None),
        cost=None if speedup is None else Cost(1.0, speedup),
    )


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        ((12.5, 1.0), (11.5, 10.0)),  # an output below the floor of 12 dB is broken
        ((21.0, 1.2), (60.0, 1.1)),  # 15 % faster and close comes before all that is not
        ((21.0, 1.2), (19.0, 10.0)),  # ... and before all that are further from float
        ((21.0, 1.0), (19.0, 10.0)),  # ... even where none is faster than float
        ((19.0, 1.1), (40.0, 0.8)),  # ... but not where one is slower
        ((30.0, 2.1), (90.0, 2.0)),  # faithful outputs are worth no less than better ones
        ((30.0, 1.6), (20.0, 2.3)),  # the first 10 dB below that must buy 0.6 doublings
        ((20.0, 2.5), (30.0, 1.6)),
        ((13.0, 1.0), (19.9, 0.8)),  # nothing is worth being much slower than float
        ((40.0, 0.95), (13.8, 1.9)),  # what the noise of a race may be decides nothing
        ((19.9, 0.98), (13.0, 1.0)),  # 3 % are noise
    ],
)
def test_a_better_candidate_ranks_higher(better, worse):
    assert candidate(*better).rank > candidate(*worse).rank


def test_twice_the_bytes_must_buy_more_than_what_noise_may_be():
    in_8_bits, in_16_bits = candidate(23.0, 1.45), replace(candidate(39.0, 1.2), size_bytes=2)

    assert in_16_bits.worth > in_8_bits.worth
    assert in_8_bits.rank > in_16_bits.rank
    assert replace(in_16_bits, cost=Cost(1.0, 1.3)).rank > in_8_bits.rank


@pytest.mark.parametrize(
    ("sqnr_db", "speedup", "worth"),
    [
        (30.0, 2.0, 1.0),
        (MAX_SQNR_DB, 0.5, -1.0 - 10.0 * (1.0 + math.log2(0.97))),
        (20.0, 4.0, 2.0 - 0.6),
        (10.0, 4.0, 2.0 - 0.6 * 4),
        (40.0, 0.97, math.log2(0.97)),
    ],
)
def test_worth_is_speed_in_doublings_less_what_lost_fidelity_must_buy(sqnr_db, speedup, worth):
    assert candidate(sqnr_db, speedup).worth == pytest.approx(worth)


@pytest.mark.parametrize(("sqnr_db", "is_faithful"), [(27.0, False), (27.5, True), (90.0, True)])
def test_what_more_fidelity_is_worth_less_to_than_the_noise_of_a_race_is_faithful(
    sqnr_db, is_faithful
):
    assert candidate(sqnr_db, 1.0).is_faithful == is_faithful


@pytest.mark.parametrize(
    ("sqnr_db", "options", "reaches_it"),
    [
        (20.0, {}, True),
        (19.9, {}, False),
        (15.0, {"floor_db": 15.0}, True),
        (14.9, {"floor_db": 15.0}, False),
        (None, {}, True),  # an output that is not float has no SQNR
        (40.0, {"flaw": "holds NaN"}, False),
        (
            40.0,
            {"flaw": "has shape (3,)", "is_reshaped": True},
            True,
        ),  # other results cannot be compared
    ],
)
def test_the_aim_is_20_db_or_the_floor_of_the_user(sqnr_db, options, reaches_it):
    assert candidate(sqnr_db, 2.0, **options).reaches_aim == reaches_it


def test_what_other_samples_may_have_counts_for_the_aim():
    lucky = candidate(22.0, 2.0)
    output = replace(lucky.fidelity.per_output[0], lower_db=19.0)
    lucky = replace(lucky, fidelity=replace(lucky.fidelity, per_output=(output,)))

    assert (lucky.is_sound, lucky.reaches_aim) == (True, False)
    assert candidate(22.0, 2.0).rank > lucky.rank > candidate(33.0, 1.0).rank


def test_in_4_bits_no_more_is_aimed_at_than_the_floor():
    node = NodePlan("n", "MatMul", Compute.DYNAMIC, Storage.INT4, ("w",), 1)

    assert not candidate(13.0, 2.0).reaches_aim
    assert candidate(13.0, 2.0, node).reaches_aim


def test_without_a_timing_the_gain_is_by_the_times_of_the_target():
    static = NodePlan("n", "MatMul", Compute.STATIC, Storage.INT8, ("w",), 100)
    in_float = replace(static, compute=Compute.FLOAT)

    assert candidate(40.0, None).gain == candidate(40.0, None, in_float).gain == 0.0
    half, whole = candidate(40.0, None, static, in_float), candidate(40.0, None, static)
    assert 0 < half.gain < whole.gain

"""Which candidate wins: of those that a race cannot tell apart in speed, the nearest to float."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest

from quant_core.evaluate.timing_cache import Cost
from quant_core.search.choose import best_of, fastest_of, of_most_worth
from quant_core.search.race import Race
from quant_core.search.search import confirmed_best
from quant_core.search.variants import Trial
from tests.unit.search.test_candidate import candidate

Measured = tuple[float, float]  # SQNR in dB, and the speed-up


def chosen(choose, *measured: Measured) -> Measured:
    """What is measured of the candidate that is chosen among these."""
    candidates = [candidate(*values) for values in measured]
    return measured[candidates.index(choose(candidates))]


@pytest.mark.parametrize(
    ("measured", "best"),
    [
        ([(24.0, 2.0), (24.2, 1.95)], (24.2, 1.95)),  # within 3 %, the nearest to float
        ([(24.0, 2.0), (24.2, 1.93)], (24.0, 2.0)),  # not within 3 %: what is of most worth
        ([(40.0, 2.0), (80.0, 1.95)], (40.0, 2.0)),  # faithful ones are equally near
        ([(24.0, 2.0), (29.0, 1.95), (40.0, 1.1)], (29.0, 1.95)),
        ([(11.0, 9.0), (13.0, 1.0)], (13.0, 1.0)),  # a broken output never wins
        ([(13.0, 1.0), (11.0, 1.0)], (13.0, 1.0)),
        ([(24.0, 2.0)], (24.0, 2.0)),
    ],
)
def test_the_best_is_of_the_highest_rank_and_of_equally_fast_ones_the_nearest_to_float(
    measured, best
):
    assert chosen(best_of, *measured) == chosen(best_of, *reversed(measured)) == best


@pytest.mark.parametrize(
    ("measured", "fastest"),
    [
        ([(5.0, 4.0), (40.0, 3.0)], (5.0, 4.0)),  # whatever its outputs are like
        ([(5.0, 4.0), (9.0, 3.9)], (9.0, 3.9)),
        ([(5.0, 4.0), (9.0, 3.9), (20.0, 3.7)], (9.0, 3.9)),  # as fast as the fastest, not as that
    ],
)
def test_the_fastest_is_the_nearest_to_float_of_all_that_are_as_fast(measured, fastest):
    assert chosen(fastest_of, *measured) == chosen(fastest_of, *reversed(measured)) == fastest


@pytest.mark.parametrize(
    ("measured", "first"),
    [
        ([(20.0, 3.0), (30.0, 1.8)], (20.0, 3.0)),
        ([(20.0, 2.5), (30.0, 1.8)], (30.0, 1.8)),  # 10 dB must buy 0.6 doublings
        ([(11.0, 9.0), (30.0, 0.9)], (30.0, 0.9)),  # a broken output is worth less than any other
    ],
)
def test_of_most_worth_is_what_gains_more_than_lost_fidelity_must_buy(measured, first):
    assert chosen(of_most_worth, *measured) == chosen(of_most_worth, *reversed(measured)) == first


@pytest.mark.parametrize("choose", [best_of, fastest_of, of_most_worth])
@pytest.mark.parametrize("speedup", [2.0, 0.8])
def test_of_equal_ones_the_smallest_wins_and_then_the_nearest_to_float(choose, speedup):
    smaller, nearer, larger = (
        replace(candidate(sqnr_db, speedup), size_bytes=size_bytes)
        for sqnr_db, size_bytes in ((40.0, 100), (50.0, 100), (50.0, 101))
    )

    for order in itertools.permutations([smaller, nearer, larger]):
        assert choose(order) is nearer


LUCK = ((40.0, 1.5), (40.0, 2.0), (40.0, 1.05))
UNLUCKY = ((16.0, 1.7), (38.0, 0.8))  # the sound one may be as fast as float


@pytest.mark.parametrize(
    ("first", "again", "best"),
    [
        (LUCK, {}, (40.0, 2.0)),
        (LUCK, {2.0: 1.1}, (40.0, 1.5)),  # it was lucky: the next one is confirmed in its place
        (LUCK, {2.0: 1.1, 1.5: 1.0}, (40.0, 1.1)),  # ... but none is raced for ever
        (LUCK, {1.5: 3.0}, (40.0, 2.0)),  # what is not the best is not raced again
        (UNLUCKY, {}, (16.0, 1.7)),
        (UNLUCKY, {0.8: 1.0}, (38.0, 1.0)),
        (UNLUCKY[1:], {0.8: 1.0}, (38.0, 1.0)),
    ],
)
def test_the_best_is_confirmed_by_a_second_race(first, again, best):
    race = Race(None)
    for sqnr_db, speedup in first:
        made = replace(candidate(sqnr_db, speedup), label=str(speedup))
        race = race.after(Trial(made.label, made.plan, made))
    bench = SimpleNamespace(
        has_time_after=lambda tried: True,
        time=lambda c, which: Cost(1.0, again.get(float(c.label), c.speedup)),
    )

    found, raced = confirmed_best(race, bench)

    assert (found.sqnr_db, found.speedup) == best
    assert found.row() in raced.trace
    assert len(raced.trace) == len(first)

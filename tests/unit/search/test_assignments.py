"""How many groups of nodes go into float: which numbers are tried, and which wins."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import pytest

from quant_core.deadline import Deadline
from quant_core.evaluate.timing_cache import Cost
from quant_core.search import assignments
from quant_core.search.assignments import (
    counts_until_worse,
    every_count,
    fastest_count,
    try_assignments,
)
from quant_core.search.race import Race
from quant_core.search.variants import Trial
from tests.unit.search.problems import Problem, harmful

GROUPS = 20


@dataclass(frozen=True)
class Judged:
    """A candidate whose speed falls, and whose SQNR rises, with the number of groups in float."""

    gain: float
    sqnr_db: float
    aim: float = 20.0

    @property
    def is_faithful(self) -> bool:
        return self.sqnr_db >= 30.0

    def is_above(self, aim: float) -> bool:
        return self.sqnr_db >= aim

    @property
    def rank(self) -> tuple[bool, float]:
        return self.is_above(self.aim) and self.gain >= 0.2, self.gain + 0.01 * self.sqnr_db


def tried(
    count_where_it_reaches: float, gain: float = 1.2, loss: float = 0.05
) -> dict[int, Judged]:
    """What `counts_until_worse` tries of the assignments of a model, each of which loses so much
    speed to the one before.
    """

    def judged(count: int) -> Judged:
        return Judged(gain - loss * count, 20 + (count - count_where_it_reaches))

    found = {0: judged(0)}
    for count in counts_until_worse(GROUPS, found):
        assert count not in found
        found[count] = judged(count)
    return found


@pytest.mark.parametrize("first", range(1, GROUPS))
def test_the_fastest_that_reaches_the_aim_is_found(first):
    found = tried(first)

    assert max(found, key=lambda count: found[count].rank) == first
    assert len(found) <= 9


def test_a_fast_one_that_reaches_the_aim_is_found_where_slower_ones_do_not():
    """Noise is no function of the number alone: of 20 groups, 10 may have more of it than 4."""
    found = {0: Judged(1.2, 17.0)}
    for count in counts_until_worse(GROUPS, found):
        found[count] = Judged(1.2 - 0.05 * count, {3: 21.0, 4: 21.0, 5: 21.0}.get(count, 19.5))

    assert max(found, key=lambda count: found[count].rank) == 3


def test_what_is_slower_than_float_is_not_searched():
    found = tried(GROUPS + 5, gain=0.5)

    assert all(found[count].gain > -0.1 for count in found)


def test_where_integers_hardly_gain_speed_no_more_of_it_is_given_up():
    assert list(tried(GROUPS + 5, gain=0.1)) == [0, 1]


def test_no_more_than_two_follow_the_best_where_the_fastest_reaches_the_aim():
    assert [count for count in tried(-5) if count > 2] == []


def test_nothing_is_tried_between_two_that_are_as_fast_nor_beyond_a_faithful_best():
    assert list(tried(-5, loss=0.0)) == [0, 1, 2, 4, 8, 16]


def test_one_group_is_all_there_is():
    assert [list(counts(1, {})) for counts in (every_count, fastest_count)] == [[1], []]
    assert list(counts_until_worse(1, {})) == []
    assert list(fastest_count(7, {})) == [1]


@pytest.mark.parametrize(("seconds", "has_time"), [(1.0, True), (1000.0, False)])
def test_there_is_time_for_assignments_where_there_is_for_some_of_the_fastest(
    monkeypatch, seconds, has_time
):
    problem = Problem(harmful(), mode="static")
    made = problem.bench.judge(problem.calibrated.build(problem.plan, "fast"))
    fast = replace(made, cost=Cost(1.0, 2.0), seconds=seconds)
    slow = replace(made, label="slow", cost=Cost(1.0, 1.1), seconds=1000.0)
    race = Race(problem.calibrated).after(*(Trial(c.label, c.plan, c) for c in (fast, slow)))
    started = []
    monkeypatch.setattr(assignments, "_trials", lambda _, start, *__: started.append(start) or [])
    now = time.monotonic()

    try_assignments(race, replace(problem.bench, deadline=Deadline(now, now + 500.0)), None)

    assert started == ([fast] if has_time else [])

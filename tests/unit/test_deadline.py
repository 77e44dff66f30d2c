"""What a time budget leaves time for."""

from __future__ import annotations

import math

import pytest

from quant_core.deadline import NO_DEADLINE, Deadline


@pytest.fixture
def clock(monkeypatch):
    """A list whose last entry is the time."""
    times = [100.0]
    monkeypatch.setattr("quant_core.deadline.time.monotonic", lambda: times[-1])
    return times


def test_what_was_spent_before_counts(clock):
    deadline = Deadline.after(20.0, spent_s=5.0)

    assert deadline.seconds_left == 15.0
    assert deadline.allows(14.0)
    assert not deadline.allows(15.0)


def test_a_stage_has_its_share_of_the_time_left(clock):
    deadline = Deadline.after(20.0, spent_s=4.0)

    stage = deadline.of_stage(0.25)

    assert stage.seconds_left == 4.0
    clock.append(104.0)
    assert stage.is_over
    assert not deadline.is_past(0.4)
    clock.append(104.1)
    assert deadline.is_past(0.4)


def test_items_end_where_the_next_would_not_end_in_time(clock):
    taken = []

    for item in Deadline.after(10.0).limit(range(9)):
        taken.append(item)
        clock.append(clock[-1] + 4.0)

    assert taken == [0, 1]


def test_the_first_item_is_taken_in_any_case(clock):
    assert list(Deadline.after(1.0, spent_s=2.0).limit("ab")) == ["a"]


def test_without_a_deadline_nothing_ends(clock):
    assert not NO_DEADLINE.of_stage(0.1).is_over
    assert NO_DEADLINE.seconds_left == math.inf
    assert list(NO_DEADLINE.limit("ab")) == ["a", "b"]

"""Why a plan was chosen, in words."""

from __future__ import annotations

import pytest

from flows.console.choice import lead, why_chosen


def trial(name: str, speedup: float, sqnr_db: float) -> dict[str, object]:
    return {"candidate": name, "speedup": speedup, "sqnr_db": sqnr_db}


FAST, EXACT = trial("fast", 3.0, 20.0), trial("exact", 1.5, 40.0)


@pytest.mark.parametrize(
    ("trace", "reason"),
    [
        ([trial("it", 2.0, 40.0)], "no other plan was tried"),
        ([trial("it", 2.0, 40.0), {"candidate": "x", "error": "e"}], "no other plan was timed"),
        (
            [trial("it", 3.0, 35.0), trial("twin", 3.0, 35.2)],
            "twin runs the same kernels, and is no nearer to float",
        ),
        ([trial("it", 3.0, 35.0), EXACT], "fastest of 2 plans, 100% ahead of exact"),
        ([trial("it", 1.5, 35.0), FAST], "fast is 100% faster, but 15.0 dB further from float"),
        (
            [trial("it", 1.5, 19.0), FAST],
            "fast is 100% faster, but misses the contract or the floor",
        ),
        ([trial("it", 2.99, 35.0), FAST], "as fast as fast, and 15.0 dB nearer to float"),
        ([trial("it", 2.99, 20.0), FAST], "as good as fast, the next of 2 plans"),
        (
            [trial("it", 2.99, 20.0), trial("a, b", 3.0, 20.0)],
            'as good as "a, b", the next of 2 plans',
        ),
    ],
)
def test_the_reason_is_how_it_stands_beside_the_fastest_other_plan(trace, reason):
    assert why_chosen(trace, "it", "met") == reason


def test_what_was_made_of_a_plan_later_is_no_other_plan():
    trace = [trial("it", 3.0, 20.0), EXACT, trial("it, biases tuned", 3.0, 25.0)]

    assert why_chosen(trace, "it, biases tuned", "none").endswith("100% ahead of exact")
    assert lead(trace, "it, biases tuned") == pytest.approx(1.0)


def test_a_contract_that_no_plan_keeps_is_said():
    assert why_chosen([FAST, EXACT], "fast", "not_met").endswith("none of them keeps the contract")


def test_reports_of_earlier_versions_say_no_reason():
    assert why_chosen([FAST, EXACT], None, "met") == ""
    assert lead([FAST, EXACT], None) is None

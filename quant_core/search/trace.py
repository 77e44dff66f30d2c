"""The trace of a search: a row for each trial, and which of them no other beats."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NotRequired, TypedDict, TypeGuard


class TrialRow(TypedDict):
    """A trial in the trace, in plain JSON values.

    candidate  the label of what was tried
    speedup    float time over quantized time; None if it cannot be timed
    sqnr_db    of the worst output
    agreement  share of the decisions that are float's; None of what decides nothing
    error      why there is none of these, if the trial failed
    """

    candidate: str
    speedup: NotRequired[float | None]
    sqnr_db: NotRequired[float]
    agreement: NotRequired[float | None]
    size_bytes: NotRequired[int]
    error: NotRequired[str]


class MeasuredRow(TypedDict):
    """A trial whose speed and SQNR are known."""

    candidate: str
    speedup: float
    sqnr_db: float
    agreement: float | None
    size_bytes: int


def on_front(trials: Sequence[TrialRow]) -> list[MeasuredRow]:
    """The trials that no other beats in speed, size and SQNR together, in their order.

    Source: Pareto optimality. Trials that failed, or whose speed or SQNR is not known, are not on
    the front.
    """
    known = [trial for trial in trials if is_measured(trial)]
    return [trial for trial in known if not any(_beats(other, trial) for other in known)]


def is_measured(trial: TrialRow) -> TypeGuard[MeasuredRow]:
    """Whether the trial's speed and SQNR are known."""
    return is_finite(trial.get("speedup")) and is_finite(trial.get("sqnr_db"))


def _beats(one: MeasuredRow, other: MeasuredRow) -> bool:
    """Whether `one` is nowhere worse than `other`, and somewhere better."""
    values = [(t["speedup"], t["sqnr_db"], -t["size_bytes"]) for t in (one, other)]
    nowhere_worse = all(a >= b for a, b in zip(*values, strict=True))
    return nowhere_worse and values[0] != values[1]


def is_finite(value: object) -> bool:
    """Whether the value is a number that can be drawn and compared."""
    return isinstance(value, (int, float)) and math.isfinite(value)

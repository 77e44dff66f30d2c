"""Which of the trials of a search no other beats in time, noise and bytes together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

Row = Mapping[str, Any]  # of a trace, as `Trial.row` writes it
AnyRow = TypeVar("AnyRow", bound=Row)


def on_front(trials: Sequence[AnyRow]) -> list[AnyRow]:
    """The trials that no other beats in speed, size and SQNR together, in their order.

    Source: Pareto optimality. Trials that failed, or whose speed or SQNR is not known, are not on
    the front.
    """
    known = [trial for trial in trials if is_measured(trial)]
    return [trial for trial in known if not any(_beats(other, trial) for other in known)]


def is_measured(trial: Row) -> bool:
    """Whether the trial's speed and SQNR are known."""
    return _is_finite(trial.get("speedup")) and _is_finite(trial.get("sqnr_db"))


def _beats(one: Row, other: Row) -> bool:
    """Whether `one` is nowhere worse than `other`, and somewhere better."""
    values = [(t["speedup"], t["sqnr_db"], -(t.get("size_bytes") or 0)) for t in (one, other)]
    nowhere_worse = all(a >= b for a, b in zip(*values, strict=True))
    return nowhere_worse and values[0] != values[1]


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)

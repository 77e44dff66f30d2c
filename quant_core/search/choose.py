"""Which of several candidates wins: by rank, by speed or by worth; of equal ones the smallest.

What wins is on the Pareto front of its class: none that is at least as good in speed, SQNR and
bytes is better in one of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from quant_core.search.candidate import Candidate
from quant_core.search.policy import POLICY


def best_of(candidates: Sequence[Candidate]) -> Candidate:
    """The candidate of the highest rank; of those in its class that are as fast, the nearest to
    float.
    """
    first = max(candidates, key=lambda c: c.rank)
    alike = [c for c in candidates if c.rank[:2] == first.rank[:2]]
    return _nearest_to_float(alike, first.gain)


def fastest_of(candidates: Sequence[Candidate]) -> Candidate:
    """The fastest candidate; of those that are equally fast, the nearest to float."""
    return _nearest_to_float(candidates, max(c.gain for c in candidates))


def of_most_worth(candidates: Iterable[Candidate]) -> Candidate:
    """The candidate of most worth; a sound one comes before all others, whatever these gain."""
    return max(candidates, key=lambda c: (c.is_sound, *_value(c)))


def _nearest_to_float(candidates: Iterable[Candidate], gain: float) -> Candidate:
    """The nearest to float of the candidates that gain as much, as far as a race can tell; of
    faithful ones that of most worth.
    """
    least = gain - POLICY.clock_noise
    alike = [c for c in candidates if c.gain >= least]
    return max(alike, key=lambda c: (min(c.sqnr_db, POLICY.faithful_db), *_value(c)))


def _value(candidate: Candidate) -> tuple[float, int, float]:
    """Worth; of equal worth fewer bytes, and then SQNR."""
    return candidate.worth, -candidate.size_bytes, candidate.sqnr_db

"""The state of a search between two steps: what was tried, and what further trials are made of."""

from __future__ import annotations

from dataclasses import dataclass, replace

from quant_core.evaluate.timing_cache import Cost
from quant_core.search.calibrated import CalibratedModel
from quant_core.search.candidate import Candidate
from quant_core.search.trace import TrialRow
from quant_core.search.variants import Trial, candidates_of


@dataclass(frozen=True, slots=True, eq=False)
class Race:
    """The state of a search between two steps.

    calibrated    what further candidates are made of
    trials        what competes, and what failed
    trace         a row for each trial, also of those that no longer compete
    equalized_db  what cross-layer equalization gained, 0 if the model is not equalized
    """

    calibrated: CalibratedModel
    trials: tuple[Trial, ...] = ()
    trace: tuple[TrialRow, ...] = ()
    equalized_db: float = 0.0

    @property
    def candidates(self) -> list[Candidate]:
        """The candidates that compete."""
        return candidates_of(self.trials)

    def after(self, *trials: Trial) -> Race:
        """The race with these trials, which compete."""
        return replace(self, trials=(*self.trials, *trials)).traced(*trials)

    def traced(self, *trials: Trial) -> Race:
        """The race with rows for these trials, which do not compete."""
        return replace(self, trace=(*self.trace, *(t.row() for t in trials)))

    def with_cost(self, candidate: Candidate, cost: Cost | None) -> Race:
        """The race with another cost of one of its candidates, also in the trace."""
        timed = replace(candidate, cost=cost)
        trials = [replace(t, outcome=timed) if t.outcome is candidate else t for t in self.trials]
        rows = [timed.row() if row == candidate.row() else row for row in self.trace]
        return replace(self, trials=tuple(trials), trace=tuple(rows))

"""What a batch came to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Told of everything that happens, from any thread: {"event": "stage", "model": ..., "stage": ...} and so on
Listener = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True, slots=True)
class Result:
    """One row for each model, as in the table of that kind of run, and where the tables lie."""

    run_id: str
    rows: tuple[Mapping[str, Any], ...]
    reports: Path
    seconds: float

    @property
    def counts(self) -> dict[str, int]:
        """How many models ended in which way."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "run_id": self.run_id,
            "models": list(self.rows),
            "reports": str(self.reports),
            "seconds": self.seconds,
            **self.counts,
        }

    def _outcomes(self) -> Counter[str]:
        return Counter(row["outcome"] for row in self.rows)


@dataclass(frozen=True, slots=True)
class BatchResult(Result):
    """Of a batch: one row for each model, as in the models table."""

    @property
    def counts(self) -> dict[str, int]:
        """How many models were done, skipped, failed, and missed their contract."""
        outcomes = self._outcomes()
        not_met = sum(row["verdict"] == "not_met" for row in self.rows)
        return {key: outcomes[key] for key in ("done", "skipped", "failed")} | {"not_met": not_met}

    @property
    def exit_code(self) -> int:
        """0: every model is there and keeps its contract; 1: some are not, or do not."""
        return int(self.counts["failed"] > 0 or self.counts["not_met"] > 0)


@dataclass(frozen=True, slots=True)
class AuditResult(Result):
    """Of an audit: one row for each model that was there, as in the audits table."""

    @property
    def counts(self) -> dict[str, int]:
        """How many models are as good as ever, got worse, cannot be compared any more, and cannot be run."""
        outcomes = self._outcomes()
        return {key: outcomes[key] for key in ("kept", "regressed", "stale", "failed")}

    @property
    def exit_code(self) -> int:
        """0: nothing got worse; 1: something did."""
        return int(self.counts["failed"] > 0 or self.counts["regressed"] > 0)

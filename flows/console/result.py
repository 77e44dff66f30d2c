"""How a batch or an audit ended: one row for each model, and where the reports lie."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quant_core.evaluate.contract import Verdict
from tasks.rows import AuditOutcome, AuditRow, ModelRow, Outcome

PAGE = "report.html"  # beside the Parquet of a batch


@dataclass(frozen=True, slots=True)
class Result:
    """The rows of a run in the order of its models, the folder of its reports, and its seconds.

    skipped_lines  how many spoiled lines of what is kept between runs were passed over
    """

    run_id: str
    rows: tuple[ModelRow | AuditRow, ...]
    reports: Path
    seconds: float
    skipped_lines: int = 0

    @property
    def counts(self) -> dict[str, int]:
        """How many models ended in which way."""
        raise NotImplementedError

    @property
    def exit_code(self) -> int:
        """The exit code of the command: 0 if every model is as it should be, else 1."""
        return int(any(row.is_wrong for row in self.rows))

    @property
    def page(self) -> Path | None:
        """The page about this run, for a browser; None if there is none."""
        return None

    @property
    def message(self) -> str:
        """The counts in words, without those that are zero."""
        counts = self.counts.items()
        return ", ".join(f"{count} {key.replace('_', ' ')}" for key, count in counts if count)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "run_id": self.run_id,
            "models": [row.to_json() for row in self.rows],
            "reports": str(self.reports),
            "seconds": self.seconds,
            "skipped_lines": self.skipped_lines,
            **self.counts,
        }


@dataclass(frozen=True, slots=True)
class BatchResult(Result):
    """The result of a batch."""

    rows: tuple[ModelRow, ...]

    @property
    def counts(self) -> dict[str, int]:
        """How many models were done, skipped or failed, and how many miss their contract."""
        outcomes = Counter(row.outcome for row in self.rows)
        verdicts = Counter(row.verdict for row in self.rows)
        counts = {outcome.value: outcomes[outcome] for outcome in Outcome}
        return counts | {Verdict.NOT_MET.value: verdicts[Verdict.NOT_MET]}

    @property
    def state(self) -> str:
        """How the batch ended, as summary.json and Prefect name it."""
        if self.rows and self.counts[Outcome.FAILED] == len(self.rows):
            return "Failed"
        return "CompletedWithFailures" if self.exit_code else "Completed"

    @property
    def page(self) -> Path | None:
        """`report.html` beside the Parquet; None if it could not be written."""
        path = self.reports / PAGE
        return path if path.is_file() else None


@dataclass(frozen=True, slots=True)
class AuditResult(Result):
    """The result of an audit."""

    rows: tuple[AuditRow, ...]

    @property
    def counts(self) -> dict[str, int]:
        """How many models are as good as they were, got worse, cannot be compared, or failed."""
        outcomes = Counter(row.outcome for row in self.rows)
        return {outcome.value: outcomes[outcome] for outcome in AuditOutcome}

"""Every model that a batch has made is judged and timed again.

The outcome of each model is the first of these that applies:

    regressed  a file is missing or is not what the batch wrote
    stale      its original, samples or metric have changed: nothing can be compared
    failed     a stage failed
    regressed  it is less accurate beyond noise, misses a contract that it met, or is slower
    inconclusive  its host was busy, now or when the batch timed it: speeds are not compared
    kept       otherwise
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any

from flows.audit.published import Published
from flows.batch.digests import job_digest, url_contents
from flows.batch.failure import Failure
from flows.batch.flow_run import Caller, run_side_by_side, shown_in_prefect
from flows.batch.rows import accuracy_of
from flows.console.events import ModelDone, PhaseBegan, SkippedLines, StageBegan, Started, Waiting
from flows.console.result import AuditResult
from flows.entries import ModelEntry, new_run_id, now_after
from flows.journal import run_ids
from flows.manifest.outputs import FOLDER
from flows.regression import accuracy_lost
from quant_core.errors import QuantError
from quant_core.evaluate.contract import Verdict
from quant_core.text import joined, plain
from quant_core.versions import versions
from tasks import stages as tasks
from tasks.cache import Content, files_digest, forget_files
from tasks.locations import Url, location
from tasks.report import write_table
from tasks.rows import AuditOutcome, AuditRow

TIMINGS = 3  # a speed that looks lost is measured again, each time for longer


@dataclass(frozen=True, slots=True)
class Judged:
    """The row of a model so far, and whether the model could be run."""

    row: AuditRow
    has_run: bool = False


class Audit:
    """One audit of the models of a folder.

    skipped_lines  how many lines of the folder's journal are spoiled
    """

    def __init__(
        self,
        caller: Caller,
        published: Sequence[Published],
        max_slowdown: float,
        skipped_lines: int,
    ) -> None:
        self.published = published
        self.max_slowdown = max_slowdown
        self.skipped_lines = skipped_lines
        self.notify = shown_in_prefect("audit", len(published), caller.notify)
        self.benchmark = caller.manifest.benchmark
        self.folder = caller.manifest.folder
        self.workers = caller.workers()
        for one in published:
            self.workers.peaks[str(one.job.input), ""] = one.entry.row.peak_bytes or 0
        self.started_at = datetime.now(UTC)
        self.run_id = new_run_id(self.started_at, run_ids(self.folder / "reports"))

    def run(self) -> AuditResult:
        """Judge the models side by side, time them one after another, and write the report."""
        started = time.monotonic()
        self.notify(Started(self.run_id, len(self.published), self.workers.count()))
        if self.skipped_lines:
            journal = self.folder / FOLDER / "journal.jsonl"
            self.notify(SkippedLines(str(journal), self.skipped_lines))
        forget_files()
        judged = run_side_by_side("audit", self._calls(), self.workers.count)
        self.notify(PhaseBegan("benchmark", len(judged)))
        rows = []
        for one, found in zip(self.published, judged, strict=True):
            row = self._time(one, found.row) if found.has_run else found.row
            self.notify(ModelDone(row))
            rows.append(row)
        finished_at = now_after(self.started_at)
        rows = [replace(row, finished_at=finished_at) for row in rows]
        reports = self.folder / "reports"
        write_table(reports, "audits", self.run_id, rows)
        seconds = time.monotonic() - started
        return AuditResult(self.run_id, tuple(rows), reports, seconds, self.skipped_lines)

    def _calls(self) -> Iterator[tuple[str, Callable[[], Judged]]]:
        for one in self.published:
            yield one.job.label, partial(self._judge, one)

    def _judge(self, one: Published) -> Judged:
        """Whether the model is there, unchanged, still comparable, and as accurate as it was."""
        row = self._row(one)
        try:
            if reason := _what_changed(one.entry):
                return Judged(replace(row, outcome=AuditOutcome.REGRESSED, reason=reason))
            code = self.workers.limits.allow_code
            if job_digest(one.job, code, one.entry.versions) != one.entry.digest:
                reason = "its original, its samples or its metric have changed since"
                return Judged(replace(row, outcome=AuditOutcome.STALE, reason=reason))
            self.workers.contents |= _contents(one)
            self.notify(StageBegan(one.job.name, str(one.job.output), "validate"))
            name, values = one.job.label, one.job.to_dict()
            found = tasks.validate(name, self.workers, values, one.job.output)["result"]
        except QuantError as problem:
            return Judged(_failed(row, "validate", problem))
        return Judged(_compared(row, one, plain(found)), has_run=True)

    def _row(self, one: Published) -> AuditRow:
        """The row of a model of which nothing is known but what the batch recorded."""
        ours = versions()
        return AuditRow(
            run_id=self.run_id,
            model=one.job.name,
            digest=one.entry.digest,
            output=str(one.job.output),
            outcome=AuditOutcome.KEPT,
            metric=one.entry.row.metric,
            accuracy_before=one.entry.row.accuracy,
            made_with=json.dumps(one.entry.versions),
            host=platform.node(),
            quantmill=ours["quantmill"],
            onnx=ours["onnx"],
            onnxruntime=ours["onnxruntime"],
            started_at=self.started_at,
        )

    def _time(self, one: Published, row: AuditRow) -> AuditRow:
        """The row with today's speed-up.

        Only quiet timings are compared. The model is slower if they stay below what was measured
        then, however often it is timed.
        """
        before = one.timing
        if before is None or before.speedup_lo is None or before.speedup is None:
            return row
        row = replace(row, speedup_before=before.speedup)
        if before.busy:
            return _inconclusive(row, "the batch timed it while its host was busy")
        least = before.speedup_lo * (1 - self.max_slowdown)
        for attempt in range(TIMINGS):
            self.notify(StageBegan(one.job.name, str(one.job.output), "benchmark"))
            try:
                row = self._timed(one, row, self.benchmark.seconds * 2**attempt)
            except QuantError as problem:
                return _failed(row, "benchmark", problem)
            if not row.busy and row.speedup is not None and row.speedup >= least:
                return row
        if row.busy:
            return _inconclusive(row, "this host was busy while it was timed")
        slower = (
            f"speedup {row.speedup:.2f}, was {before.speedup:.2f} "
            f"({before.speedup_lo:.2f} at the least)"
        )
        reasons = joined([row.reason, slower])
        return replace(row, outcome=AuditOutcome.REGRESSED, reason=reasons)

    def _timed(self, one: Published, row: AuditRow, seconds: float) -> AuditRow:
        """The row with the speed-up that one benchmark of so many seconds measures."""
        assert one.timing is not None
        job, threads = one.job, one.timing.threads or 1
        name, values = job.label, job.to_dict()

        def on_wait(patience_s: float) -> None:
            self.notify(Waiting(job.name, str(job.output), patience_s))

        answer = tasks.benchmark(name, self.workers, values, job.output, threads, seconds, on_wait)
        return replace(
            row,
            speedup=answer["result"]["timing"]["speedup"],
            host_load=answer["host_load"],
            busy=answer["busy"],
        )


def _compared(row: AuditRow, one: Published, found: Mapping[str, Any]) -> AuditRow:
    """The row with today's accuracy, and the outcome that follows from it and from the contract."""
    today = accuracy_of(one.job, found["fidelity"])
    before, samples = one.entry.row, found["fidelity"]["samples"]
    reason = accuracy_lost(today["metric"], before.accuracy, today["accuracy"], samples)
    if found["verdict"] == Verdict.NOT_MET and before.verdict is Verdict.MET:
        reason = found["reason"]
    outcome = AuditOutcome.REGRESSED if reason else AuditOutcome.KEPT
    return replace(row, outcome=outcome, reason=reason or "", accuracy=today["accuracy"])


def _inconclusive(row: AuditRow, reason: str) -> AuditRow:
    """The row of a model whose speed cannot be compared; what is known to be worse stays worse."""
    reasons = joined([row.reason, f"speed not compared: {reason}"])
    is_kept = row.outcome is AuditOutcome.KEPT
    outcome = AuditOutcome.INCONCLUSIVE if is_kept else row.outcome
    return replace(row, outcome=outcome, reason=reasons)


def _failed(row: AuditRow, stage: str, problem: QuantError) -> AuditRow:
    return replace(row, outcome=AuditOutcome.FAILED, **Failure(stage, problem).columns())


def _what_changed(entry: ModelEntry) -> str | None:
    """Which of the files that the batch wrote are missing or changed, in words; None if none is."""
    folder, missing, is_changed = location(entry.row.output).parent, [], False
    for name, known in entry.files.items():
        try:
            is_changed |= files_digest(folder, [name]) != {name: list(known)}
        except FileNotFoundError:
            missing.append(name)
    if missing:
        return f"is missing: {', '.join(missing)}"
    return "the file is not what the batch wrote" if is_changed else None


def _contents(one: Published) -> dict[str, Content]:
    """What the URLs hold that the audit of a model reads."""
    contents, output = url_contents(one.job), one.job.output
    if isinstance(output, Url):
        contents[str(output)] = Content(output.parent, output.name, one.entry.files)
    return contents

"""What one run of a batch finds and writes down: what is up to date, entries, and reports.

It needs neither Prefect nor workers, so that a run which has nothing to make starts none.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from flows.batch.copies import copy_files, name_outputs
from flows.batch.failure import Failure
from flows.batch.rebuild import heal, tables_of
from flows.batch.rows import failed_entry, run_row, skipped_entry
from flows.batch.to_do import job_digests, largest_first, owner_of
from flows.console.events import Listener, ModelDone, SkippedLines, Started
from flows.console.result import PAGE, BatchResult
from flows.entries import EndEntry, ModelEntry, now_after
from flows.journal import Journal
from flows.manifest.jobs import Job, Manifest, select
from flows.runtime.run_options import RunOptions
from quant_core.errors import RequestError, not_written
from quant_core.model.atomic import discard
from tasks.cache import Content
from tasks.locations import Url, location
from tasks.rows import Outcome


class Record:
    """One run over the jobs of a manifest: a new one, or the last one if that was interrupted.

    finished  path of an output -> its entry, which is in the journal
    contents  URL -> what it holds, for the models and data that the jobs read from stores

    Raises: RequestError if no model matches `only`.
    """

    def __init__(
        self, manifest: Manifest, journal: Journal, notify: Listener, options: RunOptions
    ) -> None:
        self.manifest = manifest
        self.journal = journal
        self.notify = notify
        self.options = options
        self.jobs = select(manifest, options.only)
        request = json.dumps([manifest.digest(), options.force, sorted(options.only)])
        self.begun, self.finished = journal.begin_run(request)
        self.run_id = self.begun.run_id
        self.costs = manifest.costs or journal.folder / "costs.jsonl"
        self.contents: dict[str, Content] = {}
        self.started = time.monotonic()
        self.workers = 0
        self.skipped_lines = 0
        self.recording = threading.Lock()

    def start(self, workers: int) -> None:
        """Report that the run begins on so many workers, and what is spoiled of what was kept."""
        self.workers = workers
        self.notify(Started(self.run_id, len(self.jobs), workers))
        self.skipped_lines = self._skipped_lines()

    def find_what_to_do(self) -> Iterator[tuple[Job, str]]:
        """The jobs that have to be made, with their digests; see the table in batch.py. The largest
        come first, so that no worker is left with a large one when all others have ended.

        Models that are finished, up to date or unreadable get their entries here.
        """
        known = {entry.row.output for entry in self.journal.models()}
        for job, digest in job_digests(
            largest_first(self.jobs),
            known,
            owner_of(self.manifest),
            self.contents,
            self.options,
        ):
            if isinstance(digest, Failure):
                self.add(failed_entry(job, "", self.run_id, digest))
                continue
            try:
                is_finished = self._is_finished(job, digest)
            except OSError as error:
                failure = Failure("publish", not_written(error, job.output))
                self.add(failed_entry(job, digest, self.run_id, failure))
                continue
            if not is_finished:
                yield job, digest

    def add(self, entry: ModelEntry) -> None:
        """Write down that a model is finished, and report it."""
        with self.recording:
            self.journal.append(entry)
            self.finished[entry.row.output] = entry
        self.notify(ModelDone(entry.row))

    def end(self) -> BatchResult:
        """The result of the run, every model of which is finished. Its reports are written here.

        Raises: RequestError if a file cannot be copied beside the outputs.
        """
        entries = [self.finished[str(job.output)] for job in self.jobs]
        rows = tuple(entry.row for entry in entries)
        reports = self.manifest.folder / "reports"
        seconds = time.monotonic() - self.started
        result = BatchResult(self.run_id, rows, reports, seconds, self.skipped_lines)
        self._report(result, entries)
        self._copy(entries)
        return result

    def forget_answers(self, store: Url | None) -> None:
        """Delete the answers of stages but those of failed models, which go on there next time.

        A run over some of the models deletes none.

        store  where workers that share no disk have left the files of stages
        """
        if self.options.only or self.manifest.keep_cache:
            return
        entries = self.finished.values()
        failed = {entry.digest for entry in entries if entry.row.outcome is Outcome.FAILED}
        self.journal.forget_all_but(failed, store)

    def _is_finished(self, job: Job, digest: str) -> bool:
        """Whether this run or an earlier one made the model; then its row is reported."""
        made = self.journal.up_to_date(job.output, digest)
        if made is None:
            return False
        before = self.finished.get(str(job.output))
        if before is not None and before.digest == digest:
            self.notify(ModelDone(before.row))
            return True
        if self.options.force or not self.manifest.skip_existing:
            return False
        self.add(skipped_entry(job, self.run_id, made))
        return True

    def _skipped_lines(self) -> int:
        """How many lines of the journal and of the table of costs are spoiled; each file is named.

        A table of our own that holds no cost at all is set aside.
        """
        counts = {
            self.journal.path: self.journal.skipped_lines,
            self.costs: _skipped_costs(self.costs, is_own=self.manifest.costs is None),
        }
        for path, lines in counts.items():
            if lines:
                self.notify(SkippedLines(str(path), lines))
        return sum(counts.values())

    def _report(self, result: BatchResult, entries: Sequence[ModelEntry]) -> None:
        """Write the reports, then the entry that ends the run."""
        finished_at = now_after(self.begun.started_at)
        run = run_row(self.begun, result, finished_at, self.workers, self.manifest.folder)
        from tasks.report import write_tables  # it imports pyarrow

        write_tables(result.reports, self.run_id, tables_of(entries, run))
        self.journal.append(EndEntry(self.run_id, finished_at, result.counts, run))
        heal(self.manifest.folder, self.journal)
        from flows.report.page import write_report  # it is not needed before

        # The Parquet has everything: a page that cannot be made must not fail the batch.
        with contextlib.suppress(Exception):
            write_report(result.reports, result.reports / PAGE, self.run_id)

    def _copy(self, entries: Sequence[ModelEntry]) -> None:
        """Put beside the outputs what belongs there: last, as no model needs it.

        Raises: RequestError if a file cannot be copied.
        """
        outputs = {job.output for job in self.manifest.jobs}
        copy_files(copy for copy in self.manifest.copies if copy[0] not in outputs)
        rows = [entry.row for entry in entries]
        made = {location(row.output) for row in rows if row.outcome is not Outcome.FAILED}
        name_outputs(self.manifest.copies, made, owner_of(self.manifest), self.options.force)


def _skipped_costs(costs: Path, *, is_own: bool) -> int:
    """How many of its lines are spoiled; a table of our own that holds no cost is set aside."""
    if not costs.exists():
        return 0
    from quant_core.evaluate.timing_cache import TimingCache  # it imports onnxruntime

    try:
        return TimingCache(costs).skipped_lines
    except RequestError:
        if not is_own:  # it may be another file of the user
            raise
        lines = 1 if costs.is_dir() else len(costs.read_bytes().splitlines())
        torn = costs.with_name(f".{costs.name}.torn")
        discard(torn)
        costs.replace(torn)
        return lines

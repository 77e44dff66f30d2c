"""The life of a run, from its first entry to its reports.

Three kinds of entry (entries.py) tell it, each one line that is on the disk before work goes on:

    run    begins a run, with a digest of what was requested
    model  one model is finished; holds its rows of the reports
    end    all models are finished, and the reports are written

What becomes of a model, as outcome x verdict:

    outcome  verdict  what it means                                     exit code
    -------  -------  ------------------------------------------------  ---------
    done     met      made by this run, meets its contract              0
    done     not_met  made and published, misses it; `reason` says why  1
    done     none     made by this run, without a contract              0
    skipped  any      up to date: row and verdict of an earlier run     as done
    failed   none     `stage`, `error` say why; tried again next time   1

A model's path, and where an interrupted run goes on (`python -m flows.batch` with the same request,
after a `run` entry that no `end` follows):

    entry or answer that is there        what the run does with the model
    -----------------------------------  ------------------------------------------------------
    model, done or skipped, files stand  nothing: its row is taken from the entry
    model, failed                        as if there were no entry: the failure may be gone
    no model, but of an earlier run      skipped, unless `force` or not `skip_existing`
    answers of some stages               the next stage; answers are kept in cache/DIGEST
    none                                 prepare, calibrate, quantize, validate, publish, benchmark

Stages of all models run side by side. Benchmarks come after them, one at a time: what runs beside
a benchmark would be in its numbers. Reports come last, and after them the `end` entry.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path

from flows.batch.copies import copy_files, name_outputs
from flows.batch.flow_run import Caller, run_side_by_side, shown_in_prefect
from flows.batch.model_run import ModelRun, share
from flows.batch.rebuild import heal, tables_of
from flows.batch.rows import failed_entry, model_entry, run_row, skipped_entry
from flows.batch.to_do import in_portions, input_bytes, job_digests, largest_first, owner_of
from flows.console.events import ModelDone, PhaseBegan, SkippedLines, Started
from flows.console.result import PAGE, BatchResult
from flows.entries import EndEntry, ModelEntry, RunEntry, now_after
from flows.journal import Journal
from flows.manifest.jobs import Job
from flows.stage_answers import Stages
from quant_core.errors import QuantError, RequestError, not_written
from quant_core.model.atomic import discard
from tasks.cache import the_cache
from tasks.locations import location
from tasks.report import report
from tasks.rows import ModelRow, Outcome


class Batch:
    """One run over the jobs of a manifest.

    finished  path of an output -> its entry, which is in the journal
    stopping  is set once a model has failed and no other may be started
    """

    def __init__(
        self,
        caller: Caller,
        journal: Journal,
        run: RunEntry,
        jobs: Sequence[Job],
        finished: Mapping[str, ModelEntry],
    ) -> None:
        self.manifest = caller.manifest
        self.notify = shown_in_prefect("batch", len(jobs), caller.notify)
        self.journal = journal
        self.begun = run
        self.run_id = run.run_id
        self.jobs = jobs
        self.finished = dict(finished)
        self.store = caller.store
        self.workers = caller.workers()
        self.workers.peaks |= journal.peaks()
        self.costs = self.manifest.costs or journal.folder / "costs.jsonl"
        self.stopping = threading.Event()
        self.recording = threading.Lock()

    def run(self, force: bool) -> BatchResult:
        """Make what is not up to date, time it, and write the reports."""
        started, workers = time.monotonic(), self.workers.count()
        self.notify(Started(self.run_id, len(self.jobs), workers))
        skipped_lines = self._skipped_lines()
        room, contents = the_cache().max_bytes // 2, self.workers.contents
        portions = in_portions(self._find_what_to_do(force), room, contents)
        first = next(portions)
        shards = max(1, workers // max(1, len(first)))  # many workers share the samples
        calls = self._calls(chain(first, chain.from_iterable(portions)), force, shards)
        made = run_side_by_side("model", calls, self.workers.count)
        self._share([model for model in made if model.failure is None])
        self._benchmark([model for model in made if model.failure is None])
        entries = [self.finished[str(job.output)] for job in self.jobs]
        rows = tuple(entry.row for entry in entries)
        reports = self.manifest.folder / "reports"
        seconds = time.monotonic() - started
        result = BatchResult(self.run_id, rows, reports, seconds, skipped_lines)
        self._report(result, entries, workers)
        self._copy([entry.row for entry in entries], force)
        return result

    def forget_answers(self) -> None:
        """Delete the answers of stages but those of failed models, which go on there next time."""
        entries = self.finished.values()
        failed = {entry.digest for entry in entries if entry.row.outcome is Outcome.FAILED}
        self.journal.forget_all_but(failed, self.store)

    def _copy(self, rows: Sequence[ModelRow], force: bool) -> None:
        """Put beside the outputs what belongs there: last, as no model needs it.

        Raises: RequestError if a file cannot be copied.
        """
        outputs = {job.output for job in self.manifest.jobs}
        copy_files(copy for copy in self.manifest.copies if copy[0] not in outputs)
        made = {location(row.output) for row in rows if row.outcome is not Outcome.FAILED}
        name_outputs(self.manifest.copies, made, owner_of(self.manifest), force)

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

    def _find_what_to_do(self, force: bool) -> Iterator[tuple[Job, str]]:
        """The jobs that have to be made, with their digests; see the table above. The largest come
        first, so that no worker is left with a large one when all others have ended.

        Models that are finished, up to date or unreadable get their entries here.
        """
        known = {entry.row.output for entry in self.journal.models()}
        owner, contents = owner_of(self.manifest), self.workers.contents
        code = self.workers.limits.allow_code
        for job, digest in job_digests(
            largest_first(self.jobs), known, owner, contents, force=force, allow_code=code
        ):
            if not isinstance(digest, str):
                self._record(failed_entry(job, "", self.run_id, digest))
                continue
            try:
                is_finished = self._is_finished(job, digest, force)
            except OSError as error:
                failure = "publish", not_written(error, job.output)
                self._record(failed_entry(job, digest, self.run_id, failure))
                continue
            if not is_finished:
                yield job, digest

    def _is_finished(self, job: Job, digest: str, force: bool) -> bool:
        """Whether this run or an earlier one made the model; then its row is reported."""
        made = self.journal.up_to_date(job.output, digest)
        if made is None:
            return False
        before = self.finished.get(str(job.output))
        if before is not None and before.digest == digest:
            self.notify(ModelDone(before.row))
            return True
        if force or not self.manifest.skip_existing:
            return False
        self._record(skipped_entry(job, self.run_id, made))
        return True

    def _calls(
        self, to_do: Iterable[tuple[Job, str]], force: bool, shards: int
    ) -> Iterator[tuple[str, Callable[[], ModelRun]]]:
        """A name and a call for each model that is to be made.

        Once a model has failed and none may be started, the others fail here.
        """
        for job, digest in to_do:
            if self.stopping.is_set():
                hint = "Set continue_on_error, or mend that one first"
                problem = QuantError("not started: another failed", "", hint)
                self._record(failed_entry(job, digest, self.run_id, ("start", problem)))
                continue
            with contextlib.suppress(OSError):
                self.workers.expect(str(job.input), input_bytes(job, self.workers.contents))
            stages = self._stages(digest, force)
            model = ModelRun(job, digest, stages, self.workers, self.costs, self.notify)
            with contextlib.suppress(OSError):
                if self.journal.was_changed(job.output, digest):
                    model.note = "made again: its files were not what the batch had written"
            yield job.label, partial(self._make, model, shards)

    def _stages(self, digest: str, force: bool) -> Stages:
        """The answers that a model goes on from; with `force`, only those of this very run."""
        stages = self.journal.stages(digest, self.store)
        if force and stages.answer("forced") != self.run_id:
            stages.forget()
            stages = self.journal.stages(digest, self.store)
            stages.keep("forced", self.run_id)
        return stages

    def _make(self, model: ModelRun, shards: int) -> ModelRun:
        """Run all stages of a model but its benchmark. A model that fails is finished at once."""
        model.make(shards)
        if model.failure is not None:
            self._finish(model)
        return model

    def _share(self, models: Sequence[ModelRun]) -> None:
        """Store weights once that several of the models hold, where all that may are made anew.

        The file of the others is not replaced, because what is up to date reads it.
        """
        for data in {(job.output.parent, job.data) for job in self.manifest.jobs if job.data}:
            every = [job for job in self.manifest.jobs if (job.output.parent, job.data) == data]
            group = [model for model in models if model.job in every]
            if len(group) == len(every):
                share(group)

    def _benchmark(self, models: Sequence[ModelRun]) -> None:
        """Time the models one after another, if at all, and finish them."""
        how = self.manifest.benchmark
        if how.seconds and models:
            self.notify(PhaseBegan("benchmark", len(models)))
        for model in models:
            if how.seconds:
                model.benchmark(how)
            self._finish(model)

    def _finish(self, model: ModelRun) -> None:
        self._record(self._entry(model))
        if model.failure is None and not self.manifest.keep_cache:
            model.stages.forget()
        if model.failure is not None and not self.manifest.continue_on_error:
            self.stopping.set()

    def _entry(self, model: ModelRun) -> ModelEntry:
        """The model's entry. The model fails if an answer of its stages fits no column."""
        try:
            return model_entry(model, self.run_id)
        except (KeyError, TypeError, ValueError) as problem:
            model.fail_to_read(problem)
            assert model.failure is not None
            return failed_entry(model.job, model.digest, self.run_id, model.failure)

    def _record(self, entry: ModelEntry) -> None:
        with self.recording:
            self.journal.append(entry)
            self.finished[entry.row.output] = entry
        self.notify(ModelDone(entry.row))

    def _report(self, result: BatchResult, entries: Sequence[ModelEntry], workers: int) -> None:
        """Write the reports, then the entry that ends the run."""
        finished_at = now_after(self.begun.started_at)
        run = run_row(self.begun, result, finished_at, workers, self.manifest.folder)
        report(self.run_id, result.reports, tables_of(entries, run))
        self.journal.append(EndEntry(self.run_id, finished_at, result.counts, run))
        heal(self.manifest.folder, self.journal)
        from flows.report.page import write_report  # it is not needed before

        # The Parquet has everything: a page that cannot be made must not fail the batch.
        with contextlib.suppress(Exception):
            write_report(result.reports, result.reports / PAGE, self.run_id)


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

"""The batch as a Prefect flow: the life of a run, from its first entry to its reports.

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
    skipped  any      up to date: row and verdict of the run made it    as done
    failed   none     `stage` and `error` say why; tried again next time 1

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
import json
import os
import platform
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

from flows.runtime.prefect_api import quiet_environment

quiet_environment()

# Prefect reads its settings when it is imported.
from prefect import Flow, flow  # noqa: E402
from prefect.client.schemas.objects import FlowRun, State  # noqa: E402
from prefect.states import Completed, Failed  # noqa: E402
from pydantic import Field  # noqa: E402

from flows.batch.copies import copy_files, name_outputs  # noqa: E402
from flows.batch.digests import job_digest, url_contents  # noqa: E402
from flows.batch.flow_run import (  # noqa: E402
    Caller,
    caller_or_cluster,
    current_caller,
    read_ahead,
    run_side_by_side,
    shown_in_prefect,
    untagged,
)
from flows.batch.model_run import Failure, ModelRun, share  # noqa: E402
from flows.batch.rebuild import heal  # noqa: E402
from flows.batch.rows import failed_entry, model_entry, skipped_entry  # noqa: E402
from flows.batch.run_summary import (  # noqa: E402
    PAGE,
    name_flow_run,
    summarize,
    summarize_failure,
    summary_path,
    working_in,
)
from flows.console.events import ModelDone, PhaseBegan, SkippedLines, Started  # noqa: E402
from flows.console.result import BatchResult  # noqa: E402
from flows.console.run_views import batch_lines  # noqa: E402
from flows.entries import EndEntry, ModelEntry, RunEntry  # noqa: E402
from flows.journal import Journal, Stages  # noqa: E402
from flows.manifest.files import unreadable_file  # noqa: E402
from flows.manifest.jobs import Job, Manifest, select  # noqa: E402
from flows.manifest.outputs import Owner, claim  # noqa: E402
from flows.manifest.read import read_manifest  # noqa: E402
from quant_core.errors import QuantError, RequestError  # noqa: E402
from quant_core.model.locations import model_files  # noqa: E402
from quant_core.plan.targets import cpu_name, host_target_name  # noqa: E402
from quant_core.text import printable  # noqa: E402
from quant_core.worker.host import versions  # noqa: E402
from tasks.cache import Content, forget_files, the_cache  # noqa: E402
from tasks.report import report  # noqa: E402
from tasks.rows import SCHEMA_VERSION, Outcome, Row, RunRow  # noqa: E402
from tasks.stores import Url  # noqa: E402

READERS = 4  # threads that hash models before the first stage
WAITING = 2  # models beyond the number of workers, so that no worker waits for one


def _summarize_failure(flow: Flow[Any, Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Prefect's hook for a batch that broke off: write a summary among its reports.

    A manifest that cannot be read names no folder of reports; then it lies beside the manifest.
    """
    caller, path = current_caller(), Path(flow_run.parameters["manifest"])
    try:
        manifest = caller.manifest if caller else read_manifest(path)
        summary = summary_path("batch", manifest.folder)
    except QuantError:
        summary = path.with_name(f"{path.name}.summary.json")
    summarize_failure("batch", flow_run, state, summary)


@flow(
    name="quantmill-batch",
    flow_run_name="batch {manifest}",
    persist_result=False,
    on_failure=[_summarize_failure],
    on_crashed=[_summarize_failure],
)
def batch(
    manifest: str,
    scheduler: str | None = None,
    jobs: Annotated[int, Field(ge=1)] | None = None,
    force: bool = False,
    only: list[str] | None = None,
    allow_code: str | None = None,
) -> State[Any]:
    """Make every model of a manifest, and report.

    Args:
        manifest: A YAML or TOML file, as README.md shows one.
        scheduler: A Dask scheduler's address; without one, workers on this host.
        jobs: How many workers; without it, as many as cores and memory allow.
        force: Make again what is up to date.
        only: Globs over the names of models; without them, all.
        allow_code: The folder of metrics `module:function`; without it, none may run.
    """
    caller_or_own = caller_or_cluster(
        lambda: read_manifest(manifest), working_in, scheduler, jobs, allow_code
    )
    with caller_or_own as caller, untagged():
        assert caller.journal is not None
        summary = summary_path("batch", caller.manifest.folder)
        name_flow_run(summary)
        result = make_models(caller, caller.journal, force, only or [])
        state = _state(result)
        summarize("batch", result, state, batch_lines, summary)
    return state


def make_models(caller: Caller, journal: Journal, force: bool, only: Sequence[str]) -> BatchResult:
    """Begin a run or go on with the last one, make its models, and report them.

    Raises: RequestError if no model matches `only`.
    """
    jobs = select(caller.manifest, only)
    request = json.dumps([caller.manifest.digest(), force, sorted(only)])
    run, finished = journal.begin_run(request)
    batch = Batch(caller, journal, run, jobs, finished)
    result = batch.run(force)
    if not only and not caller.manifest.keep_cache:
        batch.forget_answers()
    return result


def _state(result: BatchResult) -> State[Any]:
    """How the batch ended, as Prefect's state. It carries the result."""
    if result.rows and result.counts[Outcome.FAILED] == len(result.rows):
        return Failed(message=result.message, data=result)
    if result.exit_code:
        return Completed(name="CompletedWithFailures", message=result.message, data=result)
    return Completed(message=result.message, data=result)


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
        outputs = {job.output for job in self.manifest.jobs}
        copy_files(copy for copy in self.manifest.copies if copy[0] not in outputs)
        portions = self._in_portions(self._find_what_to_do(force))
        first = next(portions)
        shards = max(1, workers // max(1, len(first)))  # many workers share the samples
        calls = self._calls(chain(first, chain.from_iterable(portions)), force, shards)
        made = run_side_by_side("model", calls, workers + WAITING)
        self._share([model for model in made if model.failure is None])
        self._benchmark([model for model in made if model.failure is None])
        entries = [self.finished[str(job.output)] for job in self.jobs]
        made_files = {
            Path(entry.row.output) for entry in entries if entry.row.outcome is not Outcome.FAILED
        }
        name_outputs(self.manifest.copies, made_files, owner_of(self.manifest), force)
        rows = tuple(entry.row for entry in entries)
        reports = self.manifest.folder / "reports"
        seconds = time.monotonic() - started
        result = BatchResult(self.run_id, rows, reports, seconds, skipped_lines)
        self._report(result, entries, workers)
        return result

    def forget_answers(self) -> None:
        """Delete the answers of stages but those of failed models, which go on there next time."""
        entries = self.finished.values()
        failed = {entry.digest for entry in entries if entry.row.outcome is Outcome.FAILED}
        self.journal.forget_all_but(failed, self.store)

    def _skipped_lines(self) -> int:
        """How many lines of the journal and of the table of costs are spoiled; each file is named.

        A table of our own that holds no cost at all is set aside.
        """
        counts = {
            self.journal.path: self.journal.skipped_lines,
            self.costs: self._skipped_costs(),
        }
        for path, lines in counts.items():
            if lines:
                self.notify(SkippedLines(str(path), lines))
        return sum(counts.values())

    def _skipped_costs(self) -> int:
        if not self.costs.exists():
            return 0
        from quant_core.evaluate.timing_cache import TimingCache  # it imports onnxruntime

        try:
            return TimingCache(self.costs).skipped_lines
        except RequestError:
            if self.manifest.costs is not None:  # it may be another file of the user
                raise
            lines = self.costs.read_bytes().splitlines()
            self.costs.replace(self.costs.with_name(f".{self.costs.name}.torn"))
            return len(lines)

    def _in_portions(self, to_do: Iterable[tuple[Job, str]]) -> Iterator[list[tuple[Job, str]]]:
        """The jobs in portions, each of which reads from stores what half of the cache holds.

        While one portion is made the next one is read, and nothing has to be fetched twice.
        """
        portion, held = [], 0
        for job, digest in to_do:
            portion.append((job, digest))
            if isinstance(job.input, Url):
                held += self._input_bytes(job)
            if held and held > the_cache().max_bytes // 2:
                yield portion
                portion, held = [], 0
        yield portion

    def _find_what_to_do(self, force: bool) -> Iterator[tuple[Job, str]]:
        """The jobs that have to be made, with their digests; see the table above.

        Models that are finished, up to date or unreadable get their entries here.
        """
        forget_files()
        known = {entry.row.output for entry in self.journal.models()}
        files = [job.input for job in self.jobs]
        files += [job.output for job in self.jobs if str(job.output) in known]
        if in_stores := [file for file in files if isinstance(file, Url)]:
            the_cache().look_at(in_stores)  # at once, and not one after another below
        owner, contents = owner_of(self.manifest), self.workers.contents
        digest_or_failure = partial(_digest_or_failure, owner=owner, force=force, contents=contents)
        for job, digest in read_ahead(digest_or_failure, self.jobs, READERS):
            if not isinstance(digest, str):
                self._record(failed_entry(job, "", self.run_id, digest))
                continue
            try:
                is_finished = self._is_finished(job, digest, force)
            except OSError as error:
                failure = "publish", _unwritable(job, error)
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
                self.workers.expect(str(job.input), self._input_bytes(job))
            stages = self._stages(digest, force)
            model = ModelRun(job, digest, stages, self.workers, self.costs, self.notify)
            with contextlib.suppress(OSError):
                if self.journal.was_changed(job.output, digest):
                    model.note = "made again: its files were not what the batch had written"
            yield printable(job.name), partial(self._make, model, shards)

    def _input_bytes(self, job: Job) -> int:
        """The size of the job's model with its external data. Raises: OSError."""
        if isinstance(job.input, Url):
            return sum(size for size, _ in self.workers.contents[str(job.input)].files.values())
        return sum(path.stat().st_size for path in model_files(job.input))

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
        if how.seconds:
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
            reason = f"{type(problem).__name__}: {problem}"
            hint = "Do the workers have the same version of quantmill?"
            model.failure = "report", QuantError(reason, "", hint)
            return failed_entry(model.job, model.digest, self.run_id, model.failure)

    def _record(self, entry: ModelEntry) -> None:
        with self.recording:
            self.journal.append(entry)
            self.finished[entry.row.output] = entry
        self.notify(ModelDone(entry.row))

    def _report(self, result: BatchResult, entries: Sequence[ModelEntry], workers: int) -> None:
        """Write the reports, then the entry that ends the run."""
        finished_at = datetime.now(UTC)
        tables: dict[str, Sequence[Row]] = {
            "layers": [row for entry in entries for row in entry.layers],
            "timings": [row for entry in entries for row in entry.timings],
            "models": result.rows,
            "runs": [self._run_row(result, finished_at, workers)],  # last: its rows are there
        }
        report(self.run_id, result.reports, tables)
        run = self._run_row(result, finished_at, workers)
        self.journal.append(EndEntry(self.run_id, finished_at, result.counts, run))
        heal(self.manifest.folder, self.journal)
        from flows.report.page import write_report  # it is not needed before

        # The Parquet has everything: a page that cannot be made must not fail the batch.
        with contextlib.suppress(Exception):
            write_report(result.reports, result.reports / PAGE, self.run_id)

    def _run_row(self, result: BatchResult, finished_at: datetime, workers: int) -> RunRow:
        started_at, counts, made_with = self.begun.started_at, result.counts, versions()
        return RunRow(
            run_id=self.run_id,
            started_at=started_at,
            finished_at=finished_at,
            seconds=(finished_at - started_at).total_seconds(),
            models=len(result.rows),
            done=counts["done"],
            skipped=counts["skipped"],
            failed=counts["failed"],
            not_met=counts["not_met"],
            folder=str(self.manifest.folder),
            workers=workers,
            host=platform.node(),
            target=host_target_name(),
            python=platform.python_version(),
            quantmill=made_with["quantmill"],
            onnx=made_with["onnx"],
            onnxruntime=made_with["onnxruntime"],
            cpu=cpu_name(),
            command=printable(shlex.join(sys.orig_argv)),
            schema_version=SCHEMA_VERSION,
        )


def owner_of(manifest: Manifest) -> Owner:
    """Whom the outputs of a manifest belong to."""
    folder = os.path.realpath(manifest.folder)
    return Owner(folder, os.path.realpath(manifest.file) if manifest.file else None)


def _digest_or_failure(
    job: Job, owner: Owner, force: bool, contents: dict[str, Content]
) -> str | Failure:
    """The digest of a job that may be made; else the stage at which it cannot be, and why.

    contents  gets what the URLs hold that the job reads
    """
    if unreadable := unreadable_file(job):
        return "read", unreadable
    try:
        digest = job_digest(job)
        contents |= url_contents(job)
    except QuantError as problem:
        return "read", problem
    try:
        claim(job.output, owner, take_over=force)
    except QuantError as problem:
        return "publish", problem
    except OSError as error:
        return "publish", _unwritable(job, error)
    return digest


def _unwritable(job: Job, error: OSError) -> RequestError:
    reason = (error.strerror or str(error)).lower()
    hint = "Is there space, and may you write there?"
    return RequestError(f"cannot be written: {reason}", str(job.output), hint)

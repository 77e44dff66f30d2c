"""The batch as a Prefect flow: all models' stages side by side, then one benchmark at a time, then the reports."""

from __future__ import annotations

import contextlib
import json
import platform
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from flows.runtime.dask import dask_client, how_many_workers
from flows.runtime.prefect_api import quiet_environment

quiet_environment()

# Prefect reads its settings when it is imported.
from prefect import Flow, flow, runtime, task  # noqa: E402
from prefect.cache_policies import NO_CACHE  # noqa: E402
from prefect.client.schemas.objects import FlowRun, State  # noqa: E402
from prefect.context import TagsContext  # noqa: E402
from prefect.states import Completed, Failed  # noqa: E402
from pydantic import Field  # noqa: E402

from flows.batch.digests import forget_files, job_digest, model_files, versions  # noqa: E402
from flows.batch.journal import FOLDER, Journal, open_journal  # noqa: E402
from flows.batch.model_run import Making, failed, plain_row  # noqa: E402
from flows.console.result import AuditResult, BatchResult, Listener  # noqa: E402
from flows.console.summary import says, show_in_prefect, write_summary, wrong  # noqa: E402
from flows.manifest.jobs import Job, Manifest, read_manifest, select  # noqa: E402
from quant_core.errors import QuantError  # noqa: E402
from quant_core.plan.targets import host_target_name  # noqa: E402
from quant_core.text import printable  # noqa: E402
from quant_core.worker.child import STAGE_MODULE  # noqa: E402
from tasks.workers import Workers  # noqa: E402

if TYPE_CHECKING:
    from distributed import Client

READERS = 4  # threads that hash models before the first stage
SUMMARY = "summary.json"
SHOWN = (
    "model",
    "outcome",
    "verdict",
    "size_ratio",
    "accuracy_float",
    "accuracy",
    "speedup",
    "reason",
    "error",
)


class Attached:
    """What a caller in this process brings along, and takes back: none of it is JSON, so none is a flow parameter."""

    def __init__(
        self, manifest: Manifest, client: Client, notify: Listener, module: str = STAGE_MODULE
    ) -> None:
        self.manifest, self.client, self.notify, self.module = manifest, client, notify, module
        self.result: BatchResult | AuditResult | None = None


_attached: ContextVar[Attached | None] = ContextVar("attached", default=None)


def untagged() -> TagsContext:
    """Tasks would inherit the run's tags, and Prefect ask its API for a concurrency limit of each before every task."""
    return TagsContext(current_tags=set())


def attached() -> Attached | None:
    """What the caller brought, if there is one in this process."""
    return _attached.get()


@contextlib.contextmanager
def attach(here: Attached) -> Iterator[None]:
    """The flow, when called inside, works with this."""
    token = _attached.set(here)
    try:
        yield
    finally:
        _attached.reset(token)


def _summarize_failure(flow: Flow[Any, Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Prefect's hook: a batch that broke off says so where its reports lie, or else beside its manifest."""
    here, manifest = _attached.get(), Path(flow_run.parameters["manifest"])
    try:
        path = (here.manifest if here else read_manifest(manifest)).folder / "reports" / SUMMARY
    except QuantError:
        path = manifest.with_name(f"{manifest.name}.{SUMMARY}")
    if not says(path, str(flow_run.id)):
        told = {
            "kind": "batch",
            "flow_run": flow_run.name,
            "flow_run_id": str(flow_run.id),
            "state": state.name,
        }
        write_summary(path, told | {"message": state.message})


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
) -> State[Any]:
    """Make every model of a manifest, and report.

    Args:
        manifest: A YAML or TOML file, as README.md shows one.
        scheduler: A Dask scheduler's address; without one, workers on this host.
        jobs: How many workers; without it, as many as cores and memory allow.
        force: Make again what is up to date.
        only: Globs over the names of models; without them, all.
    """
    with (
        _here(manifest, scheduler, jobs) as here,
        open_journal(here.manifest.folder) as journal,
        untagged(),
    ):
        here.result = result = Batch(here, journal, force, only or []).run()
        summary = {"run_id": result.run_id, "reports": str(result.reports), **result.counts}
        show_in_prefect("batch", result.run_id, result.rows, SHOWN, summary)
        state = _state(result, summary)
        told = {
            "kind": "batch",
            "flow_run": runtime.flow_run.name,
            "flow_run_id": runtime.flow_run.id,
            "state": state.name,
        }
        write_summary(
            result.reports / SUMMARY,
            {**told, "message": state.message, **summary, "wrong": wrong(result.rows)},
        )
    return state


def _state(result: BatchResult, summary: dict[str, Any]) -> State[Any]:
    """How the batch ended, in Prefect's words."""
    counts = ", ".join(
        f"{count} {key.replace('_', ' ')}" for key, count in result.counts.items() if count
    )
    if result.rows and result.counts["failed"] == len(result.rows):
        return Failed(message=counts, data=summary)
    if result.exit_code:
        return Completed(name="CompletedWithFailures", message=counts, data=summary)
    return Completed(message=counts, data=summary)


class Batch:
    """One run over a manifest."""

    def __init__(self, here: Attached, journal: Journal, force: bool, only: Sequence[str]) -> None:
        self.manifest, self.notify, self.journal = here.manifest, here.notify, journal
        self.jobs = select(self.manifest, only)
        self.force, self.only = force, only
        request = json.dumps([self.manifest.digest(), force, sorted(only)])
        self.run_id, self.finished = journal.begin_run(request)
        self.workers = workers_of(here)
        self.workers.peaks |= journal.peaks()
        self.costs = self.manifest.costs or journal.folder / "costs.jsonl"
        self.stopping = threading.Event()

    def run(self) -> BatchResult:
        started, count = time.monotonic(), self.workers.count()
        self.notify(
            {"event": "started", "run_id": self.run_id, "models": len(self.jobs), "workers": count}
        )
        makings = self._make_all(self._sort_out(), count)
        benchmark = self.manifest.benchmark
        if benchmark.seconds:  # alone: what runs beside it would be in its numbers
            self.notify({"event": "phase", "phase": "benchmark", "models": len(makings)})
        for making in makings:
            if benchmark.seconds:
                making.benchmark(benchmark)
            self._finish(making)
        rows = [self.finished[job.name]["row"] for job in self.jobs]
        reports = self.manifest.folder / "reports"
        result = BatchResult(self.run_id, tuple(rows), reports, time.monotonic() - started)
        self._report(result, count)
        return result

    def _sort_out(self) -> list[tuple[Job, str]]:
        """Jobs that have to be made, with their digests. Finished ones and unreadable ones get their row here.

        What failed in a run that was cut short is tried again: what was in its way may be what cut the run short.
        """
        todo = []
        forget_files()
        with ThreadPoolExecutor(READERS) as readers:
            for job, digest in zip(
                self.jobs, readers.map(_digest_or_error, self.jobs), strict=True
            ):
                before = self.finished.get(job.name)
                if isinstance(digest, QuantError):
                    self._reject(job, "", "read", digest)
                elif (
                    before
                    and before["digest"] == digest
                    and self.journal.up_to_date(job.output, digest)
                ):
                    self.notify({"event": "model", **before["row"]})
                elif not self.force and self.manifest.skip_existing and self._skip(job, digest):
                    pass
                else:
                    todo.append((job, digest))
        return todo

    def _skip(self, job: Job, digest: str) -> bool:
        """Whether it is up to date; then its row says so, with the numbers of the run that made it."""
        entry = self.journal.up_to_date(job.output, digest)
        if entry is not None:
            row = entry["row"] | {
                "outcome": "skipped",
                "model": job.name,
                "started_at": _now(),
                "finished_at": _now(),
            }
            self._record(
                job, entry | {"job": job.to_dict(), "row": row, "layers": [], "timings": []}
            )
        return entry is not None

    def _make_all(self, todo: Sequence[tuple[Job, str]], workers: int) -> list[Making]:
        """Every model as far as it gets, some more at a time than there are workers; failed ones are finished."""
        slots = threading.Semaphore(workers + 2)
        shards = max(
            1, workers // max(1, len(todo))
        )  # few models on many workers: share out the samples
        futures = []
        for job, digest in todo:
            slots.acquire()
            if self.stopping.is_set():
                slots.release()
                reason = QuantError(
                    "not started: another failed",
                    "",
                    "Set continue_on_error, or mend that one first",
                )
                self._reject(job, digest, "start", reason)
                continue
            stages = self.journal.stages(digest)
            if self.force and stages.answer("forced") != self.run_id:
                stages.forget()
                stages = self.journal.stages(digest)
                stages.keep("forced", self.run_id)
            with contextlib.suppress(OSError):
                self.workers.expect(
                    str(job.input), sum(path.stat().st_size for path in model_files(job.input))
                )
            making = Making(job, digest, stages, self.workers, self.costs, self.notify)
            futures.append(_make.submit(printable(job.name), self, making, slots, shards))
        makings = [future.result() for future in futures]
        return [making for making in makings if making.failure is None]

    def _reject(self, job: Job, digest: str, stage: str, problem: QuantError) -> None:
        """A failed row for a model that no stage has seen."""
        row = plain_row(job, digest, _now()) | failed(stage, problem)
        self._record(
            job,
            {
                "event": "model",
                "digest": digest,
                "files": {},
                "row": row,
                "layers": [],
                "timings": [],
            },
        )

    def _finish(self, making: Making) -> None:
        entry = making.entry(self.run_id)
        self._record(making.job, entry)
        if making.failure is None and not self.manifest.keep_cache:
            making.stages.forget()
        if making.failure is not None and not self.manifest.continue_on_error:
            self.stopping.set()

    def _record(self, job: Job, entry: dict[str, Any]) -> None:
        entry = entry | {
            "run_id": self.run_id,
            "name": job.name,
            "row": entry["row"] | {"run_id": self.run_id},
        }
        with _RECORDING:
            self.journal.append(entry)
            self.finished[job.name] = entry
        self.notify({"event": "model", **entry["row"]})

    def _report(self, result: BatchResult, workers: int) -> None:
        """Parquet from the journal's entries of this run, then the line that says it is over."""
        from tasks.report import report

        started = datetime.fromisoformat(self.journal.started_at(self.run_id))
        finished = datetime.now(UTC)
        run = {
            "run_id": self.run_id,
            "started_at": started,
            "finished_at": finished,
            "seconds": (finished - started).total_seconds(),
            "models": len(result.rows),
            **result.counts,
            "folder": str(self.manifest.folder),
            "workers": workers,
            "host": platform.node(),
            "target": host_target_name(),
            "python": platform.python_version(),
            **versions(),
        }
        entries = [self.finished[job.name] for job in self.jobs]
        tables = {
            "layers": [layer for entry in entries for layer in entry["layers"]],
            "timings": [_timed(timing) for entry in entries for timing in entry["timings"]],
            "models": [_timed(entry["row"]) for entry in entries],
            "runs": [run],  # last: a run that is listed has all its rows
        }
        report(self.run_id, result.reports, tables)
        self.journal.append(
            {
                "event": "end",
                "run_id": self.run_id,
                "finished_at": finished.isoformat(),
                **result.counts,
            }
        )
        if not self.only and not self.manifest.keep_cache:
            self.journal.forget_all_but(
                {entry["digest"] for entry in entries if entry["row"]["outcome"] == "failed"}
            )


@task(name="model", task_run_name="model {name}", cache_policy=NO_CACHE, persist_result=False)
def _make(name: str, run: Batch, making: Making, slots: threading.Semaphore, shards: int) -> Making:
    """All stages of one model but its benchmark."""
    try:
        making.make(shards)
        if making.failure is not None:
            run._finish(making)
    finally:
        slots.release()
    return making


_RECORDING = threading.Lock()


def workers_of(here: Attached) -> Workers:
    """The client's workers, with the manifest's limits. A batch that was killed may have left marks."""
    limits, marks = here.manifest.limits, here.manifest.folder / FOLDER / "begun"
    shutil.rmtree(marks, ignore_errors=True)
    marks.mkdir(parents=True, exist_ok=True)
    return Workers(
        here.client,
        limits.timeout_s,
        limits.memory_mb and limits.memory_mb << 20,
        marks,
        here.module,
    )


@contextlib.contextmanager
def _here(manifest: str, scheduler: str | None, jobs: int | None) -> Iterator[Attached]:
    """What the caller attached; what a deployment needs where nobody did."""
    here = _attached.get()
    if here is not None:
        yield here
        return
    asked = read_manifest(manifest)
    with dask_client(how_many_workers(len(asked.jobs), jobs, asked.workers), scheduler) as client:
        yield Attached(asked, client, lambda event: None)


def _digest_or_error(job: Job) -> str | QuantError:
    try:
        return job_digest(job)
    except QuantError as problem:
        return problem


def _timed(row: dict[str, Any]) -> dict[str, Any]:
    """With times that Arrow takes."""
    moments = {
        key: datetime.fromisoformat(row[key])
        for key in ("started_at", "finished_at")
        if row.get(key)
    }
    return row | moments


def _now() -> str:
    return datetime.now(UTC).isoformat()

"""The audit as a Prefect flow: what a batch has made is judged and timed again, against today's onnxruntime."""

from __future__ import annotations

import contextlib
import json
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from threading import Semaphore
from typing import Annotated, Any
from uuid import uuid4

from flows.runtime.dask import dask_client, how_many_workers
from flows.runtime.prefect_api import quiet_environment

quiet_environment()

# Prefect reads its settings when it is imported.
from prefect import Flow, flow, runtime, task  # noqa: E402
from prefect.cache_policies import NO_CACHE  # noqa: E402
from prefect.client.schemas.objects import FlowRun, State  # noqa: E402
from prefect.states import Completed, Failed  # noqa: E402
from pydantic import Field  # noqa: E402

from flows.batch.digests import files_digest, forget_files, job_digest, versions  # noqa: E402
from flows.batch.flow import Attached, attached, untagged, workers_of  # noqa: E402
from flows.batch.journal import FOLDER, open_journal  # noqa: E402
from flows.batch.model_run import accuracy_of  # noqa: E402
from flows.console.result import AuditResult  # noqa: E402
from flows.console.summary import says, show_in_prefect, write_summary, wrong  # noqa: E402
from flows.manifest.jobs import Job, Manifest, select  # noqa: E402
from quant_core.errors import QuantError, RequestError  # noqa: E402
from quant_core.metrics import find_metric  # noqa: E402
from quant_core.text import plain, printable  # noqa: E402
from tasks import stages as tasks  # noqa: E402
from tasks.report import report  # noqa: E402

SUMMARY = "audit-summary.json"
SHOWN = (
    "model",
    "outcome",
    "accuracy_before",
    "accuracy",
    "speedup_before",
    "speedup",
    "reason",
    "error",
)
TIMINGS = 3  # a speed that looks lost is measured again, each time for longer


@dataclass(frozen=True, slots=True)
class Standing:
    """What the journal says of one model that is there.

    timing  the benchmark of the run that made it, None if there was none
    """

    job: Job
    digest: str
    made_with: Mapping[str, str]
    files: Mapping[str, Sequence[Any]]
    row: Mapping[str, Any]
    timing: Mapping[str, Any] | None


@flow(name="quantmill-audit", flow_run_name="audit {output_dir}", persist_result=False)
def audit(
    output_dir: str,
    scheduler: str | None = None,
    jobs: Annotated[int, Field(ge=1)] | None = None,
    only: list[str] | None = None,
    max_slowdown: Annotated[float, Field(ge=0, lt=1)] = 0.1,
) -> State[Any]:
    """Judge and time again every model that a batch has made. A regression is a failed audit.

    Args:
        output_dir: Where the batch has written.
        scheduler: A Dask scheduler's address; without one, workers on this host.
        jobs: How many workers; without it, as many as cores and memory allow.
        only: Globs over the names of models; without them, all.
        max_slowdown: The share of the speed-up that may be lost beyond what varied when it was measured.
    """
    with _here(output_dir, scheduler, jobs, only or []) as (here, standing), untagged():
        here.result = result = Audit(here, standing, max_slowdown).run()
        facts = {"run_id": result.run_id, "reports": str(result.reports), **result.counts}
        show_in_prefect("audit", result.run_id, result.rows, SHOWN, facts)
        counts = ", ".join(
            f"{count} {outcome}" for outcome, count in result.counts.items() if count
        )
        ended = Failed if result.exit_code else Completed
        state: State[Any] = ended(message=counts, data=facts)
        told = {
            "kind": "audit",
            "flow_run": runtime.flow_run.name,
            "flow_run_id": runtime.flow_run.id,
        }
        told |= {"state": state.name, "message": counts}
        write_summary(result.reports / SUMMARY, {**told, **facts, "wrong": wrong(result.rows)})
    return state


@audit.on_failure
@audit.on_crashed
def _summarize_failure(flow: Flow[Any, Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Prefect's hook: an audit that broke off says so where its reports would lie."""
    path = Path(flow_run.parameters["output_dir"]) / "reports" / SUMMARY
    if path.parent.is_dir() and not says(path, str(flow_run.id)):
        told = {
            "kind": "audit",
            "flow_run": flow_run.name,
            "flow_run_id": str(flow_run.id),
            "state": state.name,
        }
        write_summary(path, told | {"message": state.message})


def read_standing(folder: Path, only: Sequence[str]) -> list[Standing]:
    """What the journal of an output folder says is there. Raises: RequestError if there is no journal, or nothing."""
    if not (folder / FOLDER / "journal.jsonl").is_file():
        raise RequestError(
            "is no batch's output folder", str(folder), "Name the output_dir of a manifest"
        )
    with open_journal(folder) as journal:
        entries = [e for e in journal.entries if e["event"] == "model" and e.get("job")]
    timings = {e["digest"]: t for e in entries for t in e["timings"] if t["stage"] == "benchmark"}
    latest = {e["row"]["output"]: e for e in entries if e["row"]["outcome"] != "failed"}
    found = [
        Standing(
            Job.from_dict(e["job"]),
            e["digest"],
            e["versions"],
            e["files"],
            e["row"],
            timings.get(e["digest"]),
        )
        for e in latest.values()
    ]
    if not found:
        raise RequestError(
            "holds no model that a batch has made", str(folder), "Run the batch first"
        )
    chosen = {job.name for job in select(Manifest(tuple(s.job for s in found), folder), only)}
    return [standing for standing in found if standing.job.name in chosen]


class Audit:
    """One audit of what stands in a folder."""

    def __init__(self, here: Attached, standing: Sequence[Standing], max_slowdown: float) -> None:
        self.standing, self.max_slowdown = standing, max_slowdown
        self.notify, self.benchmark = here.notify, here.manifest.benchmark
        self.folder, self.workers = here.manifest.folder, workers_of(here)
        self.workers.peaks |= {(str(s.job.input), ""): s.row["peak_bytes"] or 0 for s in standing}
        self.started = datetime.now(UTC)
        self.run_id = f"{self.started:%Y%m%dT%H%M%S}-{uuid4().hex[:6]}"

    def run(self) -> AuditResult:
        started, count = time.monotonic(), self.workers.count()
        self.notify(
            {
                "event": "started",
                "run_id": self.run_id,
                "models": len(self.standing),
                "workers": count,
            }
        )
        forget_files()
        slots, futures = Semaphore(count + 2), []
        for standing in self.standing:
            slots.acquire()
            futures.append(_judge.submit(printable(standing.job.name), self, standing, slots))
        rows = [future.result() for future in futures]
        self.notify({"event": "phase", "phase": "benchmark", "models": len(rows)})
        for standing, row in zip(self.standing, rows, strict=True):
            if "accuracy" in row:  # it could be run
                row |= self._speed(standing, row)
            self.notify({"event": "model", "verdict": "none", **row})
        moments = {"started_at": self.started, "finished_at": datetime.now(UTC)}
        own = {"run_id": self.run_id, "host": platform.node(), **versions(), **moments}
        reports = self.folder / "reports"
        report(self.run_id, reports, {"audits": [{**row, **own} for row in rows]})
        return AuditResult(
            self.run_id, tuple(map(plain, rows)), reports, time.monotonic() - started
        )

    def judge(self, standing: Standing) -> dict[str, Any]:
        """Is it there, unchanged, still comparable, and as right as it was?"""
        job, row = standing.job, standing.row
        own = {
            "model": job.name,
            "output": str(job.output),
            "digest": standing.digest,
            "metric": row["metric"],
        }
        own |= {"made_with": json.dumps(standing.made_with), "accuracy_before": row["accuracy"]}
        try:
            if damage := _damage(standing):
                return own | {"outcome": "regressed", "reason": damage}
            if job_digest(job, standing.made_with) != standing.digest:
                return own | {
                    "outcome": "stale",
                    "reason": "its original or its samples have changed since",
                }
            self.notify({"event": "stage", "model": job.name, "stage": "validate"})
            name, asked = printable(job.name), job.to_dict()
            found = tasks.validate(name, self.workers, asked, job.output)["result"]
        except QuantError as problem:
            told = {
                "stage": "validate",
                "error": problem.problem,
                "where": problem.where,
                "hint": problem.hint,
            }
            return own | {"outcome": "failed", **told}
        today = accuracy_of(job, found["fidelity"])
        lost = _lost(
            today["metric"], row["accuracy"], today["accuracy"], found["fidelity"]["samples"]
        )
        if found["verdict"] == "not_met" and row["verdict"] == "met":
            lost = found["reason"]
        outcome = {"outcome": "regressed" if lost else "kept", "reason": lost or ""}
        return own | outcome | {"accuracy": today["accuracy"]}

    def _speed(self, standing: Standing, row: Mapping[str, Any]) -> dict[str, Any]:
        """Today's speed-up; lost if it stays below what was measured then, however often one looks."""
        job, before = standing.job, standing.timing
        if before is None or before["speedup_lo"] is None:
            return {}
        least = before["speedup_lo"] * (1 - self.max_slowdown)
        told: dict[str, Any] = {"speedup_before": before["speedup"]}
        for attempt in range(TIMINGS):
            seconds = self.benchmark.seconds * 2**attempt
            self.notify({"event": "stage", "model": job.name, "stage": "benchmark"})
            try:
                name, threads = printable(job.name), int(before["threads"])
                run = tasks.benchmark(
                    name, self.workers, job.to_dict(), job.output, threads, seconds
                )
            except QuantError as problem:
                error = {
                    "stage": "benchmark",
                    "error": problem.problem,
                    "where": problem.where,
                    "hint": problem.hint,
                }
                return told | {"outcome": "failed", **error}
            told |= {"speedup": run["result"]["timing"]["speedup"]} | {
                key: run[key] for key in ("host_load", "busy")
            }
            if told["speedup"] >= least:
                return told
        lost = f"speedup {told['speedup']:.2f}, was {before['speedup']:.2f} ({before['speedup_lo']:.2f} at the least)"
        return told | {
            "outcome": "regressed",
            "reason": "; ".join(filter(None, (row["reason"], lost))),
        }


@task(name="audit", task_run_name="audit {name}", cache_policy=NO_CACHE, persist_result=False)
def _judge(name: str, run: Audit, standing: Standing, slots: Semaphore) -> dict[str, Any]:
    """All of a model's audit but its benchmark."""
    try:
        return run.judge(standing)
    finally:
        slots.release()


@contextlib.contextmanager
def _here(
    output_dir: str, scheduler: str | None, jobs: int | None, only: Sequence[str]
) -> Iterator[tuple[Attached, list[Standing]]]:
    """What the caller attached, or what a deployment needs; and what there is to audit."""
    folder = Path(output_dir).absolute()
    standing = read_standing(folder, only)
    here = attached()
    if here is not None:
        yield here, standing
        return
    manifest = Manifest(tuple(s.job for s in standing), folder)
    with dask_client(how_many_workers(len(standing), jobs), scheduler) as client:
        yield Attached(manifest, client, lambda event: None), standing


def _damage(standing: Standing) -> str | None:
    """What became of the files that were written."""
    folder, names = standing.job.output.parent, list(standing.files)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        return f"is missing: {', '.join(missing)}"
    if files_digest(folder, names) != {name: list(known) for name, known in standing.files.items()}:
        return "the file is not what the batch wrote"
    return None


def _lost(metric: str, before: float | None, today: float | None, samples: int) -> str | None:
    """What of the accuracy is gone, beyond noise."""
    if before is None:
        return None
    if today is None:
        return f"{metric} was {before:.4f} and cannot be measured"
    noise = find_metric(metric).noise(before, samples)
    return f"{metric} {today:.4f}, was {before:.4f}" if today < before - noise else None

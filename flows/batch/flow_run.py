"""What all flows do alike: take their caller, run tasks side by side, write a summary."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from threading import Semaphore
from typing import TYPE_CHECKING, Any, TypeVar

from flows.runtime.dask import dask_client, how_many_workers
from flows.runtime.prefect_api import quiet_environment
from flows.runtime.signals import before_stop, in_another_thread

quiet_environment()

# Prefect reads its settings when it is imported.
from prefect import runtime, tags, task  # noqa: E402
from prefect.cache_policies import NO_CACHE  # noqa: E402
from prefect.client.schemas.objects import FlowRun, State  # noqa: E402
from prefect.context import TagsContext  # noqa: E402

from flows.batch.journal import is_taken  # noqa: E402
from flows.console.events import Listener, ignore  # noqa: E402
from flows.console.result import Result  # noqa: E402
from flows.console.summary import (  # noqa: E402
    read_summary,
    show_in_prefect,
    write_summary,
    wrong,
)
from flows.manifest.code import check_code  # noqa: E402
from flows.manifest.jobs import Manifest  # noqa: E402
from flows.manifest.outputs import FOLDER  # noqa: E402
from quant_core.errors import QuantError, StageError  # noqa: E402
from quant_core.worker.child import STAGE_MODULE  # noqa: E402
from tasks.workers import Workers  # noqa: E402

if TYPE_CHECKING:
    from distributed import Client

RUNNING = "Running"  # the state of a run that has not ended

T = TypeVar("T")
R = TypeVar("R", bound=Result)


@dataclass(frozen=True, slots=True)
class Caller:
    """What a caller in this process gives a flow. None of it is JSON, as parameters have to be.

    module      is run by workers to serve stages; tests have others
    allow_code  the folder of metrics `module:function`; None: none may run
    """

    manifest: Manifest
    client: Client
    notify: Listener
    module: str = STAGE_MODULE
    allow_code: str | None = None

    def workers(self) -> Workers:
        """The client's workers, with the manifest's limits."""
        limits, marks = self.manifest.limits, self.manifest.folder / FOLDER / "begun"
        shutil.rmtree(marks, ignore_errors=True)  # marks of a batch that was killed
        marks.mkdir(parents=True, exist_ok=True)
        memory_bytes = limits.memory_mb and limits.memory_mb << 20
        return Workers(
            self.client, limits.timeout_s, memory_bytes, marks, self.module, self.allow_code
        )


_caller: ContextVar[Caller | None] = ContextVar("caller", default=None)


def current_caller() -> Caller | None:
    """Who called this flow from within the process; None if a deployment runs it."""
    return _caller.get()


@contextlib.contextmanager
def caller_or_cluster(
    manifest: Callable[[], Manifest],
    scheduler: str | None,
    jobs: int | None,
    allow_code: str | None,
) -> Iterator[Caller]:
    """The caller of this flow; without one, the workers that a deployment needs."""
    caller = _caller.get()
    if caller is not None:
        yield caller
        return
    own = manifest()
    check_code(own.jobs, allow_code)
    workers = how_many_workers(len(own.jobs), jobs, own.workers)
    with dask_client(workers, scheduler) as client:
        yield Caller(own, client, ignore, allow_code=allow_code)


def call_flow(
    kind: str, flow: Callable[..., State[Any]], caller: Caller, result: type[R], hint: str
) -> R:
    """The result of a flow that `caller` calls. `kind` is its tag in Prefect.

    Raises: QuantError as the flow raised it; StageError with `hint` if anything else stopped it.
    """
    token = _caller.set(caller)
    try:
        with tags("quantmill", kind):
            state = in_another_thread(lambda: flow(return_state=True))
    finally:
        _caller.reset(token)
    found = state.result(raise_on_failure=False)
    if isinstance(found, result):
        return found
    if isinstance(found, QuantError):
        raise found
    where = str(caller.manifest.folder)
    raise StageError(f"the {kind} stopped: {found or state.message}", where, hint)


def untagged() -> TagsContext:
    """A context in which tasks do not inherit the run's tags.

    Before every task Prefect would ask its API for a concurrency limit of each tag.
    """
    return TagsContext(current_tags=set())


def run_side_by_side(
    kind: str, calls: Iterable[tuple[str, Callable[[], T]]], at_once: int
) -> list[T]:
    """The results of these named calls, each of which is a Prefect task called `kind NAME`.

    A call is taken from the iterator when there is a free place among `at_once`, not earlier.
    """
    named = _call.with_options(name=kind, task_run_name=f"{kind} {{name}}")
    places = Semaphore(at_once)
    waiting = iter(calls)
    futures = []
    places.acquire()
    for name, call in waiting:
        futures.append(named.submit(name, call, places))
        places.acquire()
    return [future.result() for future in futures]


@task(cache_policy=NO_CACHE, persist_result=False)
def _call(name: str, call: Callable[[], T], places: Semaphore) -> T:
    try:
        return call()
    finally:
        places.release()


@contextlib.contextmanager
def running_summary(kind: str, path: Path) -> Iterator[None]:
    """Write to `path` that the run is working, and if a signal stops it, that it was stopped.

    A summary that still says so when the next run starts is of a run that was killed: the
    summary of the next one names it under `interrupted`.
    """
    begun = _flow_run(kind, RUNNING, "")
    begun |= {"pid": os.getpid(), "host": platform.node()}
    before = read_summary(path)
    if before.get("state") == RUNNING:
        keys = ("flow_run", "flow_run_id", "pid", "host", "written_at")
        begun["interrupted"] = {key: before.get(key) for key in keys}
    stopped = {**begun, "state": "Stopped", "message": "stopped by a signal"}
    write_summary(path, begun)
    with before_stop(lambda: write_summary(path, stopped)):
        yield


def summarize(
    kind: str, result: Result, state: State[Any], columns: Sequence[str], path: Path
) -> None:
    """Show the result in Prefect's UI, with these columns of its rows, and write it to `path`."""
    facts = {"run_id": result.run_id, "reports": str(result.reports), **result.counts}
    show_in_prefect(kind, result.run_id, result.rows, columns, facts)
    flow_run = _flow_run(kind, state.name, state.message)
    begun = read_summary(path)
    kept: dict[str, Any] = {
        key: begun[key] for key in ("pid", "host", "interrupted") if key in begun
    }
    write_summary(path, {**flow_run, **kept, **facts, "wrong": wrong(result.rows)})


def summarize_failure(kind: str, flow_run: FlowRun, state: State[Any], path: Path) -> None:
    """Write the summary of a flow run that broke off, unless it has ended already.

    A run that was turned away, because another one is working in the folder, writes nothing.
    """
    begun = read_summary(path)
    is_own = begun.get("flow_run_id") == str(flow_run.id)
    if is_taken(path.parent.parent) or (is_own and begun["state"] != RUNNING):
        return
    kept: dict[str, Any] = {
        key: begun[key] for key in ("pid", "host", "interrupted") if is_own and key in begun
    }
    ended: dict[str, Any] = {
        "kind": kind,
        "flow_run": flow_run.name,
        "flow_run_id": str(flow_run.id),
        "state": state.name,
        "message": state.message,
    }
    write_summary(path, ended | kept)


def _flow_run(kind: str, state: str | None, message: str | None) -> dict[str, Any]:
    return {
        "kind": kind,
        "flow_run": runtime.flow_run.name,
        "flow_run_id": runtime.flow_run.id,
        "state": state,
        "message": message,
    }

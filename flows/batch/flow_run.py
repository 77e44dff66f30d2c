"""What all flows do alike: take their caller, and run tasks side by side."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from threading import Semaphore
from typing import TYPE_CHECKING, Any, TypeVar

from flows.runtime.dask import dask_client, how_many_workers
from flows.runtime.own_server import START_HINT
from flows.runtime.prefect_api import drop_events, has_own_server, is_lost, quiet_environment
from flows.runtime.signals import in_another_thread

quiet_environment()

# Prefect reads its settings when it is imported.
from prefect import tags, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.context import TagsContext

from flows.console.artifacts import with_progress
from flows.console.events import Listener, Unrecorded, ignore
from flows.console.result import Result
from flows.journal import Journal
from flows.manifest.custom_metrics import check_custom_metrics
from flows.manifest.jobs import Manifest
from flows.manifest.outputs import FOLDER
from quant_core.errors import QuantError, StageError, reason_of
from quant_core.model.atomic import make_own_folder
from quant_core.worker.run import StageLimits
from tasks import stores
from tasks.locations import Location, Url
from tasks.workers import Workers

if TYPE_CHECKING:
    from distributed import Client

T = TypeVar("T")
R = TypeVar("R", bound=Result)

WAITING = 2  # models beyond the number of workers, so that no worker waits for one


@dataclass(frozen=True, slots=True)
class Caller:
    """What a caller in this process gives a flow beside its parameters, which have to be JSON.

    allow_code  the folder of metrics `module:function`; None: none may run
    journal     of the manifest's output folder; None for an audit, which writes none
    has_own_workers  whether its workers run on this host; those of a cluster may share no disk
    on_end      is called with the result of a run whose reports and summary are written
    """

    manifest: Manifest
    client: Client
    notify: Listener
    allow_code: str | None = None
    journal: Journal | None = None
    has_own_workers: bool = True
    on_end: Callable[[Any], None] = lambda result: None

    @property
    def store(self) -> Url | None:
        """Where workers leave files for each other; None if that is the manifest's folder."""
        return None if self.has_own_workers else self.manifest.store

    def workers(self) -> Workers:
        """The client's workers, with the manifest's limits."""
        limits = self.manifest.limits
        marks: Location = (self.store or self.manifest.folder) / FOLDER / "begun"
        _empty(marks)  # marks of a batch that was killed
        memory_bytes = limits.memory_mb and limits.memory_mb << 20
        of_stages = StageLimits(limits.timeout_s, memory_bytes, allow_code=self.allow_code)
        return Workers(self.client, of_stages, marks)


def _empty(folder: Location) -> None:
    if isinstance(folder, Url):
        stores.remove(folder)
        return
    shutil.rmtree(folder, ignore_errors=True)
    make_own_folder(folder)


_caller: ContextVar[Caller | None] = ContextVar("caller", default=None)


def current_caller() -> Caller | None:
    """Who called this flow from within the process; None if a deployment runs it."""
    return _caller.get()


@contextlib.contextmanager
def caller_or_cluster(
    manifest: Callable[[], Manifest],
    begin: Callable[[Manifest], AbstractContextManager[Journal | None]],
    scheduler: str | None,
    jobs: int | None,
    allow_code: str | None,
) -> Iterator[Caller]:
    """The caller of this flow. A deployment has none: it reads the manifest and starts workers.

    begin  the context that a caller enters before it calls the flow; it yields a batch's journal
    """
    caller = _caller.get()
    if caller is not None:
        yield caller
        return
    own = manifest()
    with begin(own) as journal:
        check_custom_metrics(own.jobs, allow_code)
        workers = how_many_workers(len(own.jobs), jobs, own.workers)
        with dask_client(workers, scheduler) as client:
            yield Caller(
                own,
                client,
                ignore,
                allow_code=allow_code,
                journal=journal,
                has_own_workers=scheduler is None,
            )


def call_flow(
    kind: str, flow: Callable[..., State[Any]], caller: Caller, result: type[R], hint: str
) -> R:
    """The result of a flow that `caller` calls. `kind` is its tag in Prefect.

    A run that is over counts, also if Prefect's server was lost before it could be recorded there.

    Raises: QuantError as the flow raised it; StageError with `hint` if anything else stopped it.
    """
    ended: list[R] = []
    token = _caller.set(replace(caller, on_end=ended.append))
    try:
        with tags("quantmill", kind):
            state = in_another_thread(lambda: flow(return_state=True))
        found = state.result(raise_on_failure=False)
        reason = str(found or state.message)
    except Exception as problem:  # of Prefect's client, mostly
        found, reason = problem, str(problem) or type(problem).__name__
    finally:
        _caller.reset(token)
    if isinstance(found, result):
        return found
    if isinstance(found, QuantError):
        raise found
    drop_events()
    if ended:
        caller.notify(Unrecorded(reason))
        return ended[0]
    where = str(caller.manifest.folder)
    if "can't start new thread" in reason:
        hint = START_HINT
    if isinstance(found, OSError) and found.strerror:
        reason = reason_of(found)
        where = str(found.filename or where)
    raise StageError(f"the {kind} stopped: {reason}", where, hint)


def shown_in_prefect(kind: str, models: int, listener: Listener) -> Listener:
    """The listener of a run, which also shows its progress where Prefect's server has a UI."""
    return listener if has_own_server() else with_progress(kind, models, listener, is_lost)


def untagged() -> TagsContext:
    """A context in which tasks do not inherit the run's tags.

    Before every task Prefect would ask its API for a concurrency limit of each tag.
    """
    return TagsContext(current_tags=set())


def run_side_by_side(
    kind: str, calls: Iterable[tuple[str, Callable[[], T]]], count_workers: Callable[[], int]
) -> list[T]:
    """The results of these named calls, each of which is a Prefect task called `kind NAME`.

    At most WAITING more calls than workers are in flight; others stay in the iterator till then.
    Workers that join a cluster meanwhile get calls too.
    """
    named = _call.with_options(name=kind, task_run_name=f"{kind} {{name}}")
    places = Semaphore(0)
    known = 0

    def take_place() -> None:
        nonlocal known
        wanted = count_workers() + WAITING
        if wanted > known:
            places.release(wanted - known)
            known = wanted
        places.acquire()

    waiting = iter(calls)
    futures = []
    take_place()
    for name, call in waiting:
        futures.append(named.submit(name, call, places))
        take_place()
    return [future.result() for future in futures]


@task(cache_policy=NO_CACHE, persist_result=False)
def _call(name: str, call: Callable[[], T], places: Semaphore) -> T:
    try:
        return call()
    finally:
        places.release()

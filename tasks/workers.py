"""Where a stage runs: in the killable child of a Dask worker, within the limits of the batch."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quant_core.errors import QuantError, StageError, StageReason
from quant_core.versions import versions
from quant_core.worker.run import StageAnswer, StageLimits, run_stage, worker_death
from tasks import stores
from tasks.cache import Content
from tasks.locations import Location, Url
from tasks.remote import Remote, deaths_at, run_remote_stage, urls_in

if TYPE_CHECKING:
    from distributed import Client, Future

# How often a stage is handed out again because its worker died before the stage began there: that
# is not the fault of the stage, but it cannot go on for ever.
MAX_DEATHS_BEFORE_BEGIN = 30
LOOK_S = 15.0  # between looks whether there are workers at all, while a stage is waited for
NO_WORKER_S = 120.0  # a cluster without any worker for so long has lost them for good
WAIT_S = 3.0  # a stage that has not begun by then waits for its host
STAGES = ("prepare", "calibrate", "quantize", "validate", "sensitivity", "benchmark")
# The memory that a stage is expected to need, before it has run once:
BARE_BYTES = 150_000_000  # without a model
MODEL_COPIES = 10  # with a model of which only the size is known, in sizes of its file
GROWTH = {"quantize": 2}  # in peaks of the stages before it: it holds several candidates


class Workers:
    """A Dask client, and the limits of a stage there.

    limits         of every stage, but for the memory that it is expected to need
    patience_s     how much longer a stage that runs alone may wait until its host is free
    missing_since  when the cluster was first seen without any worker, None if it has some
    peaks          (model, stage) -> the most bytes that this stage held; stage "" for what is only
                   expected
    marks          a folder that all workers can reach, with a file for each stage that has begun
    contents       URL -> what it held when the batch read it, for the models and data of requests
    folders        URL of a model's folder in a store -> the files that its stages have written
                   there

    It is no dataclass: Prefect would look for futures inside it.
    """

    def __init__(self, client: Client, limits: StageLimits, marks: Location) -> None:
        self.client = client
        self.limits = limits
        self.patience_s = limits.timeout_s
        self.marks = marks
        self.peaks: dict[tuple[str, str], int] = {}
        self.missing_since: float | None = None
        self.contents: dict[str, Content] = {}
        self.folders: dict[str, dict[str, Sequence[Any]]] = {}

    def run(self, stage: str, model: str, request: Mapping[str, Any]) -> StageAnswer:
        """The answer of one stage of a model: what `run_stage` of worker/run.py returns.

        Raises: QuantError as the stage does; StageError if the worker was lost.
        """
        return self.run_all(stage, model, [request])[0]

    def run_alone(
        self,
        stage: str,
        model: str,
        request: Mapping[str, Any],
        on_wait: Callable[[float], None],
    ) -> StageAnswer:
        """The answer of a stage beside which no other such stage runs on its host.

        All such stages together wait for their hosts no longer than the time limit of one stage.

        on_wait  called once if the stage has to wait, with the seconds that it may wait at most

        Raises: as `run`.
        """
        alone = replace(self.limits, alone=True, patience_s=self.patience_s)
        (answer,) = self.run_all(stage, model, [request], alone, lambda: on_wait(self.patience_s))
        self.patience_s = max(0.0, self.patience_s - answer["waited_s"])
        return answer

    def run_all(
        self,
        stage: str,
        model: str,
        requests: Sequence[Mapping[str, Any]],
        limits: StageLimits | None = None,
        on_wait: Callable[[], None] | None = None,
    ) -> list[StageAnswer]:
        """The answers of one stage to several requests, on as many workers as are free.

        limits   None: those of all stages
        on_wait  called once for each request that has not begun after WAIT_S seconds

        Raises: as `run`.
        """
        need = self.need(stage, model)
        limits = replace(limits or self.limits, need_bytes=need)
        calls = [_Call(self, stage, request, limits) for request in requests]
        try:
            runs = [call.result(on_wait) for call in calls]
            self.peaks[model, stage] = max(run["peak_bytes"] for run in runs)
            return runs
        except StageError as error:
            if error.reason is StageReason.HOST_MEMORY:
                self.peaks[model, stage] = 2 * need
            raise
        finally:
            for call in calls:
                call.end()

    def need(self, stage: str, model: str) -> int:
        """The bytes that this stage of the model is expected to need.

        They are what it held last time. A stage that has not run yet is expected to need what the
        size of the model or the other stages of the model suggest.
        """
        if known := self.peaks.get((model, stage)):
            return known
        seen = max(self.peaks.get((model, other), 0) for other in STAGES)
        return max(BARE_BYTES, self.peaks.get((model, ""), 0), GROWTH.get(stage, 1) * seen)

    def expect(self, model: str, size_bytes: int) -> None:
        """Set what a model is expected to need, of which only the size of its files is known."""
        self.peaks[model, ""] = BARE_BYTES + MODEL_COPIES * size_bytes

    def remote(self, request: Mapping[str, Any], mark: Location) -> Remote | None:
        """Where the files of a request are; None if all are local."""
        contents: dict[str, Content] = {}
        folder = None
        for url in urls_in(request):
            if url in self.contents:
                contents[url] = self.contents[url]
            around = {url, str(Url(url).parent), str(Url(url).parent.parent)}
            for above in around & self.folders.keys():
                folder = Url(above)
                contents[above] = Content(folder, "", dict(self.folders[above]))
        if not contents:
            return None
        return Remote(contents, folder, mark if isinstance(mark, Url) else None)

    def check_that_some_are_left(self, stage: str) -> None:
        """Raises: StageError if the cluster has had no worker for NO_WORKER_S seconds."""
        now = time.monotonic()
        if self.client.scheduler_info(n_workers=-1)["workers"]:
            self.missing_since = None
            return
        self.missing_since = self.missing_since or now
        if now - self.missing_since >= NO_WORKER_S:
            raise StageError(
                "no Dask worker is left",
                f"stage {stage}",
                "What else runs on their hosts? The same command goes on from here",
            )

    def count(self) -> int:
        """How many workers there are."""
        return max(1, len(self.client.scheduler_info(n_workers=-1)["workers"]))


class _Call:
    """One request to a stage. It is submitted again if its worker dies before the stage begins."""

    def __init__(
        self, workers: Workers, stage: str, request: Mapping[str, Any], limits: StageLimits
    ) -> None:
        self.workers, self.stage = workers, stage
        self.mark = workers.marks / uuid.uuid4().hex
        mark = str(self.mark) if isinstance(self.mark, Path) else None
        self.arguments = (stage, dict(request), limits, mark)
        remote = workers.remote(request, self.mark)
        self.function: Callable[..., StageAnswer] = (
            partial(run_remote_stage, remote) if remote else run_stage
        )
        self.future = self._submit()

    def result(self, on_wait: Callable[[], None] | None = None) -> StageAnswer:
        from distributed.scheduler import KilledWorker

        if on_wait is not None and not self._begins_soon():
            on_wait()
        for death in range(MAX_DEATHS_BEFORE_BEGIN):
            try:
                answer = self._answer()
                self._check_versions(answer)
                return answer
            except QuantError:
                raise
            except KilledWorker as problem:
                if deaths := self._deaths():
                    raise worker_death(deaths, self.stage) from problem
                time.sleep(min(5.0, 0.05 * 2**death) * random.random())
                self.future = self._submit()
            except (Exception, asyncio.CancelledError) as problem:
                raise _as_stage_error(problem, self.stage) from problem
        raise StageError(
            "every Dask worker died before it began",
            f"stage {self.stage}",
            "What else runs on them?",
        )

    def _answer(self) -> StageAnswer:
        """The answer of the stage, whose worker may still have to be found.

        Raises: StageError if the cluster has lost all of its workers; whatever the stage raises.
        """
        while True:
            try:
                answer: StageAnswer = self.future.result(timeout=LOOK_S)
            except TimeoutError:
                if self.future.done():  # type: ignore[no-untyped-call]
                    return self.future.result()
                self.workers.check_that_some_are_left(self.stage)
            else:
                self.workers.missing_since = None
                return answer

    def _check_versions(self, answer: StageAnswer) -> None:
        """Raises: StageError if the worker has other versions than the row would name."""
        theirs = answer.get("versions", {})  # a worker that says none is of an earlier version
        if theirs != versions():
            raise StageError(
                f"its worker has other versions: {differences(theirs)}",
                f"stage {self.stage}",
                "Install the same versions on all workers",
            )

    def end(self) -> None:
        if not self.future.done():  # type: ignore[no-untyped-call]
            self.workers.client.cancel([self.future])  # type: ignore[no-untyped-call]
        with contextlib.suppress(OSError):
            self.mark.unlink() if isinstance(self.mark, Path) else stores.remove(self.mark)

    def _begins_soon(self) -> bool:
        """Whether the stage ends, or at least begins, within WAIT_S seconds."""
        try:
            self.future.result(timeout=WAIT_S)
        except TimeoutError:
            return self._deaths() > 0  # the mark has a byte while the stage runs
        except (Exception, asyncio.CancelledError):
            pass  # `result` looks at it
        return True

    def _submit(self) -> Future[StageAnswer]:
        key = f"{self.stage}-{uuid.uuid4().hex}"
        return self.workers.client.submit(self.function, *self.arguments, key=key)

    def _deaths(self) -> int:
        """The number of workers that died during the stage."""
        with contextlib.suppress(OSError):
            return deaths_at(self.mark)
        return 0


def differences(theirs: Mapping[str, str]) -> str:
    """The versions in which another host differs from this one, in words."""
    ours = versions()
    theirs = {**dict.fromkeys(ours, "unknown"), **theirs}
    names = [name for name in ours if theirs[name] != ours[name]]
    return ", ".join(f"{name} {theirs[name]} and not {ours[name]}" for name in names)


def is_transient(task: object, run: object, state: Any) -> bool:
    """Prefect's retry condition: a worker or a child was lost, or something was busy."""
    try:
        state.result()
    except StageError as error:
        return error.reason.is_transient
    except BaseException:
        return False
    return False


def _as_stage_error(problem: BaseException, stage: str) -> StageError:
    """An exception of Dask's own as an error of the stage."""
    from distributed.client import FutureCancelledError

    where = f"stage {stage}"
    if isinstance(problem, (FutureCancelledError, asyncio.CancelledError, OSError)):
        return StageError(
            "the Dask scheduler was lost",
            where,
            "Is the cluster still running?",
            StageReason.LOST,
        )
    return StageError(
        f"{type(problem).__name__}: {problem}",
        where,
        "The worker failed, not the stage: same versions?",
    )

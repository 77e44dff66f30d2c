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
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain

from flows.batch.failure import Failure
from flows.batch.flow_run import Caller, run_side_by_side
from flows.batch.model_run import ModelRun, share
from flows.batch.record import Record
from flows.batch.rows import failed_entry, model_entry
from flows.batch.to_do import in_portions, input_bytes
from flows.console.events import PhaseBegan
from flows.console.result import BatchResult
from flows.entries import ModelEntry
from flows.manifest.jobs import Job
from flows.stage_answers import StageAnswers
from quant_core.errors import QuantError
from tasks.cache import host_cache


class Batch:
    """What a run makes, on the caller's workers.

    stopping  is set once a model has failed and no other may be started
    """

    def __init__(self, record: Record, caller: Caller) -> None:
        self.record = record
        self.manifest = record.manifest
        self.journal = record.journal
        self.notify = record.notify
        self.store = caller.store
        self.workers = caller.workers()
        self.workers.peaks |= self.journal.peaks()
        self.workers.contents = record.contents
        self.stopping = threading.Event()

    def run(self) -> BatchResult:
        """Make what is not up to date, time it, and write the reports."""
        workers = self.workers.count()
        self.record.start(workers)
        room, contents = host_cache().contents.max_bytes // 2, self.record.contents
        portions = in_portions(self.record.find_what_to_do(), workers, room, contents)
        first = next(portions)
        shards = max(1, workers // max(1, len(first)))  # many workers share the samples
        calls = self._calls(chain(first, chain.from_iterable(portions)), shards)
        made = run_side_by_side("model", calls, self.workers.count)
        self._share([model for model in made if model.failure is None])
        self._benchmark([model for model in made if model.failure is None])
        return self.record.end()

    def _calls(
        self, to_do: Iterable[tuple[Job, str]], shards: int
    ) -> Iterator[tuple[str, Callable[[], ModelRun]]]:
        """A name and a call for each model that is to be made.

        Once a model has failed and none may be started, the others fail here.
        """
        for job, digest in to_do:
            if self.stopping.is_set():
                hint = "Set continue_on_error, or mend that one first"
                failure = Failure("start", QuantError("not started: another failed", "", hint))
                self.record.add(failed_entry(job, digest, self.record.run_id, failure))
                continue
            with contextlib.suppress(OSError):
                self.workers.expect(str(job.input), input_bytes(job, self.workers.contents))
            stages = self._stages(digest)
            model = ModelRun(job, digest, stages, self.workers, self.record.costs, self.notify)
            with contextlib.suppress(OSError):
                if self.journal.was_changed(job.output, digest):
                    model.note = "made again: its files were not what the batch had written"
            yield job.label, partial(self._make, model, shards)

    def _stages(self, digest: str) -> StageAnswers:
        """The answers that a model goes on from; with `force`, only those of this very run."""
        stages = self.journal.stages(digest, self.store)
        if self.record.options.force and stages.answer("forced") != self.record.run_id:
            stages.forget()
            stages = self.journal.stages(digest, self.store)
            stages.keep("forced", self.record.run_id)
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
        self.record.add(self._entry(model))
        if model.failure is None and not self.manifest.keep_cache:
            model.stages.forget()
        if model.failure is not None and not self.manifest.continue_on_error:
            self.stopping.set()

    def _entry(self, model: ModelRun) -> ModelEntry:
        """The model's entry. The model fails if an answer of its stages fits no column."""
        try:
            return model_entry(model, self.record.run_id)
        except (KeyError, TypeError, ValueError) as problem:
            model.fail_to_read(problem)
            assert model.failure is not None
            return failed_entry(model.job, model.digest, self.record.run_id, model.failure)

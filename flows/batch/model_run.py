"""How one model is made: stage by stage, each answer kept until the model is finished."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from flows.batch.digests import job_digest
from flows.batch.failure import Failure
from flows.batch.publish import publish
from flows.console.events import Listener, Made, StageBegan, Waiting
from flows.manifest.jobs import Benchmark, Job
from flows.stage_answers import StageAnswers
from quant_core.errors import SPACE_HINT, ModelError, QuantError, reason_of
from quant_core.worker.run import StageAnswer
from tasks import stages as tasks
from tasks.cache import files_digest
from tasks.locations import Location, Url
from tasks.workers import Workers

T = TypeVar("T")


class ModelRun:
    """One model on its way through its stages.

    answers  stage -> its answer, in the order in which they ran
    files    file name -> size and digest of what was published
    failure  is set once a stage has failed, and nothing more happens then
    note     what happened to the model before this run, for its row
    resumes  whether answers that were kept are still used: not after a stage that ran anew
    """

    def __init__(
        self,
        job: Job,
        digest: str,
        stages: StageAnswers,
        workers: Workers,
        costs: Path,
        notify: Listener,
    ) -> None:
        self.job = job
        self.digest = digest
        self.stages = stages
        self.workers = workers
        self.costs = costs
        self.notify = notify
        self.started_at = datetime.now(UTC)
        self.answers: dict[str, StageAnswer] = {}
        self.files: dict[str, list[Any]] = {}
        self.failure: Failure | None = None
        self.note: str | None = None
        self.resumes = True
        if isinstance(stages.files, Url):
            workers.folders[str(stages.files)] = {}

    def make(self, shards: int) -> None:
        """Prepare, calibrate, quantize, validate and publish the model.

        shards  how many workers share the samples
        """
        try:
            self._run_stages(shards)
        except (KeyError, TypeError, ValueError) as problem:
            self.fail_to_read(problem)

    def fail_to_read(self, problem: Exception) -> None:
        """Fail: an answer is not one of this version. Next time all stages run again."""
        hint = "Do the workers have the same version of quantmill?"
        reason = f"{type(problem).__name__}: {problem}"
        self.failure = Failure("report", QuantError(reason, "", hint))
        self.stages.forget()

    def _run_stages(self, shards: int) -> None:
        folder, output = self.stages.files, self._made
        shares = [folder / f"stats-{k}-of-{shards}.npz" for k in range(shards)]
        # Given that folder, validate measures sensitivity too. More workers share that.
        detailed_by = folder if shards == 1 else None

        self._step("prepare", tasks.prepare, folder, self.costs)
        prepared = self.answers.get("prepare")
        if prepared is not None and prepared["result"]["measured"]:
            self._step("calibrate", tasks.calibrate, folder, shares, self._spent_s)
        stats = self._statistics()
        self._step("quantize", tasks.quantize, folder, stats, output, self.costs, self._spent_s)
        if self._can_be_run():
            self._step("validate", tasks.validate, output, detailed_by, self._spent_s, self.costs)
        if "validate" in self.answers and not self.answers["validate"]["result"]["detailed"]:
            self._step("sensitivity", tasks.sensitivity, folder, output, shards, self._spent_s)
        self._attempt("publish", self._publish)
        self.notify(Made(self.job.name, str(self.job.output)))

    @property
    def _made(self) -> Location:
        """The quantized model before it is published, and until the model is finished."""
        return self.stages.files / "out" / self.job.output.name

    @property
    def _spent_s(self) -> float:
        """Seconds that the stages took so far, however many runs of the batch they needed."""
        return float(sum(answer["seconds"] for answer in self.answers.values()))

    def benchmark(self, how: Benchmark) -> None:
        """Time what was published, if there is a sample to time it on."""
        if not self._can_be_run():
            return
        job = self.job
        is_local = isinstance(job.output, Path) and isinstance(self.stages.files, Path)
        quantized = job.output if is_local else self._made

        def on_wait(seconds: float) -> None:
            self.notify(Waiting(job.name, str(job.output), seconds))

        self._step("benchmark", tasks.benchmark, quantized, how.threads, how.seconds, on_wait)

    def _step(self, stage: str, task: Callable[..., StageAnswer], *arguments: Any) -> None:
        """Add the answer of a stage: the one that was kept, or a new one.

        arguments  of the task, behind those that all tasks take
        """
        if self.failure is not None:
            return
        answer: StageAnswer | None = self.stages.answer(stage) if self.resumes else None
        if not isinstance(answer, dict):
            self.resumes = False
            self.notify(StageBegan(self.job.name, str(self.job.output), stage))
            started_at = datetime.now(UTC).isoformat()
            self._attempt(stage, lambda: self.stages.begin(stage))
            values = self.job.to_dict()
            call = partial(task, self.job.label, self.workers, values, *arguments)
            new = self._attempt(stage, call)
            if new is None:
                return
            answer = {"started_at": started_at, **new}
            self._attempt(stage, lambda: self.stages.keep(stage, answer))
        self.answers[stage] = answer
        if isinstance(self.stages.files, Url):
            self.workers.folders[str(self.stages.files)] |= answer.get("files", {})

    def _attempt(self, stage: str, call: Callable[[], T]) -> T | None:
        """What the call returns; None if it fails, or if a stage has failed before."""
        if self.failure is not None:
            return None
        try:
            return call()
        except QuantError as problem:
            self.failure = Failure(stage, problem)
        except OSError as problem:
            where = str(problem.filename or self.job.output)
            self.failure = Failure(stage, QuantError(reason_of(problem), where, SPACE_HINT))
        except Exception as problem:  # whatever it is, it is this model's alone
            reason = f"{type(problem).__name__}: {problem}"
            self.failure = Failure(stage, QuantError(reason, "", "Please report it"))
        return None

    def _can_be_run(self) -> bool:
        """Whether there are samples: without given ones, none may fit that could be drawn."""
        quantized = self.answers.get("quantize")
        was_checked = quantized is None or not quantized["result"]["unchecked"]
        return was_checked or not self.job.judged_by.is_random

    def _publish(self) -> None:
        self._check_that_nothing_changed()
        files = self.stages.made()
        publish(
            self.stages.files / "out", files, self.job.output, limit_s=self.workers.limits.timeout_s
        )
        self.files = files

    def _check_that_nothing_changed(self) -> None:
        """Raises: QuantError if the answers may be of another file than the digest names."""
        try:
            if job_digest(self.job, self.workers.limits.allow_code) != self.digest:
                problem = "it, its samples or its metric changed while it was made"
                hint = "The same command makes it again"
                raise ModelError(problem, str(self.job.input), hint)
        except QuantError:
            self.stages.forget()
            raise

    def _statistics(self) -> Sequence[str]:
        """The files that calibration wrote."""
        calibrated = self.answers.get("calibrate")
        return calibrated["result"]["stats"] if calibrated else []


def share(models: Sequence[ModelRun]) -> None:
    """Publish models again, with the weights that several of them hold in one file.

    They stay as they are published if none is shared, or if that fails, which their notes say.
    """
    first = models[0]
    made = [model.stages.folder / "out" / model.job.output.name for model in models]
    folder = first.stages.folder / "shared"
    name, values = first.job.label, first.job.to_dict()
    try:
        answer = tasks.share(name, first.workers, values, made, folder)
        if not answer["result"]["bytes"]:
            return
        data, names = str(first.job.data), [model.job.output.name for model in models]
        # onnx refuses a file of data that has two links.
        files = files_digest(folder, [data, *names])
        publish(folder, files, first.job.output, link=False)
        for model in models:
            model.files = files_digest(folder, [model.job.output.name, data])
    except (QuantError, OSError) as problem:
        for model in models:
            model.note = f"its weights are stored with those of no other graph: {problem}"

"""What judges candidates: the float model and its outputs, beside which each of them runs."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from quant_core.data.samples import Samples, spread
from quant_core.deadline import NO_DEADLINE, Deadline, Progress, silent
from quant_core.errors import DataError, ModelError
from quant_core.evaluate.fidelity import compare
from quant_core.evaluate.in_openvino import openvino_version, race_in_openvino
from quant_core.evaluate.outputs import Outputs, StoredOutputs, run_all, run_each
from quant_core.evaluate.timing import measure
from quant_core.evaluate.timing_cache import Cost, TimingCache
from quant_core.metrics import Fidelity, OutputFidelity
from quant_core.model.session import Feed, open_session, output_names, run
from quant_core.plan.targets import Runtime
from quant_core.plan.types import QuantPlan
from quant_core.search.candidate import Candidate
from quant_core.search.policy import POLICY
from quant_core.text import digest_of

# A race in processes of its own is this many times as long: starting them takes seconds.
IN_A_PROCESS = 5


@dataclass(frozen=True, slots=True, eq=False)
class Reference:
    """The float model with its outputs: every candidate is judged beside them.

    outputs   of each of the samples
    unsteady  names of the outputs that float itself does not repeat, run again, also without
              optimizers: they come from nodes that draw, or their values are rounding errors, or
              memory that nothing has written
    """

    path: Path
    samples: Samples
    session: ort.InferenceSession
    outputs: StoredOutputs
    unsteady: frozenset[str]

    @classmethod
    def run(cls, path: Path, samples: Samples, deadline: Deadline = NO_DEADLINE) -> Reference:
        """The float model of this file on these samples, or the first of them.

        deadline  when it should end

        Random samples that the model does not run on are left out.

        Raises: ModelError if the model does not run.
        """
        session = open_session(path)
        samples, outputs = _run_in_time(session, samples.keeping(), deadline)
        few = 1 if deadline.is_over else POLICY.steady_samples
        return cls(path, samples, session, outputs, frozenset()).repeated(few)

    def repeated(self, count: int) -> Reference:
        """This reference after so many of the samples ran again, also without optimizers."""
        few = spread(count, len(self.samples))
        first = [self.outputs[i] for i in few]
        again = [
            compare(first, run_all(s, self.samples.pick(few)), self.names)
            for s in (self.session, open_session(self.path, optimize=False))
        ]
        outputs = chain.from_iterable(fidelity.per_output for fidelity in again)
        unsteady = frozenset(output.name for output in outputs if not _is_repeated(output))
        return replace(self, unsteady=unsteady)

    def pick(self, positions: NDArray[np.intp]) -> Reference:
        """This reference with some of its samples."""
        outputs = self.outputs.pick(positions.tolist())
        return replace(self, samples=self.samples.pick(positions), outputs=outputs)

    @property
    def names(self) -> list[str]:
        """Names of the outputs."""
        return output_names(self.session)

    @property
    def steady(self) -> tuple[str, ...]:
        """Names of the outputs that float repeats."""
        return tuple(name for name in self.names if name not in self.unsteady)


@dataclass(frozen=True, slots=True, eq=False)
class Bench:
    """What judges candidates beside the float model.

    metric   the user's own, "module:function", or None
    costs    what was timed before, and what will be
    timed_in  the runtime in which their speed can be measured here; None if in none
    deadline  when a search should end with the best it has
    judged_outputs  names of the outputs that count; None: all
    progress  is called with what a search is doing
    """

    reference: Reference
    float_size_bytes: int
    metric: str | None = None
    seconds: float = POLICY.race_seconds
    costs: TimingCache = field(default_factory=TimingCache)
    timed_in: Runtime | None = Runtime.ONNXRUNTIME
    deadline: Deadline = NO_DEADLINE
    judged_outputs: tuple[str, ...] | None = None
    progress: Progress = silent

    @property
    def samples(self) -> Samples:
        """The samples that candidates are judged by."""
        return self.reference.samples

    def for_ranking(self) -> Bench:
        """A bench with a few of the samples, enough to rank nodes by their noise.

        This one if it has few, or if labels or a metric of the user's own judge.
        """
        is_small = len(self.samples) <= POLICY.ranking_samples
        if is_small or self.metric is not None or self.samples.labels is not None:
            return self
        few = spread(POLICY.ranking_samples, len(self.samples))
        return replace(self, reference=self.reference.pick(few))

    def has_time_after(self, tried: Iterable[Candidate], trials: float = 1.0) -> bool:
        """Whether there is time for so many more trials, each as long as the longest of these.

        Time is kept to build and to judge once more what wins; and where none of these is sound,
        for one that is.
        """
        tried, trials = list(tried), trials + 1
        if not any(candidate.is_sound for candidate in tried):
            trials += 1
        longest = max((candidate.seconds for candidate in tried), default=0.0)
        return self.deadline.allows(trials * longest)

    def judge(self, candidate: Candidate) -> Candidate:
        """The candidate with its fidelity, size ratio and, if there is time for that, speed-up.

        Raises: ModelError if its model does not run.
        """
        began_at = time.monotonic()
        session = open_session(candidate.model)
        judged, alike = self._with_fidelity(candidate, [(session, self.samples)])
        run_s = (time.monotonic() - began_at) / len(self.samples)
        if self.timed_in is not None and self.deadline.allows(POLICY.runs_of_a_race * run_s):
            feed = self.samples[alike[0] if alike else 0]
            judged = replace(judged, cost=self._cost(candidate, session, feed))
        return replace(judged, seconds=candidate.seconds + time.monotonic() - began_at)

    def time(self, candidate: Candidate, which: str = "") -> Cost | None:
        """How fast the candidate is, on the first sample; None if it cannot be timed here.

        which  of several races, as costs are kept

        Raises: ModelError if its model does not run.
        """
        if self.timed_in is None:
            return None
        return self._cost(candidate, open_session(candidate.model), self.samples[0], which)

    def judge_fidelity(self, candidate: Candidate) -> Candidate:
        """The judged candidate, which is not timed: it keeps the cost that it has."""
        return self.judge_together(candidate, [(candidate.model, self.samples)])

    def where_shapes_agree(self, candidate: Candidate) -> Bench | None:
        """This bench with the samples for which the candidate gives as many results as float does;
        None if there is none.
        """
        runs = [(open_session(candidate.model), self.samples)]
        alike = self._with_fidelity(candidate, runs)[1]
        return replace(self, reference=self.reference.pick(np.array(alike))) if alike else None

    def where_float_repeats(self) -> Bench:
        """This bench without the outputs that float does not repeat on some of the samples."""
        reference = self.reference.repeated(len(self.samples))
        return replace(self, reference=reference, judged_outputs=reference.steady)

    def judge_together(
        self, candidate: Candidate, runs: Iterable[tuple[ir.Model, Samples]]
    ) -> Candidate:
        """The candidate with the fidelity of these models, each on its samples, which together are
        those of this bench.
        """
        sessions = [(open_session(model), samples) for model, samples in runs]
        return self._with_fidelity(candidate, sessions)[0]

    def _with_fidelity(
        self, candidate: Candidate, runs: Sequence[tuple[ort.InferenceSession, Samples]]
    ) -> tuple[Candidate, list[int]]:
        """The candidate with its fidelity, and the samples for which all outputs have the shapes
        of the float model's.

        runs  of its model, or of several, each on some of the samples, in their order
        """
        judged = self.reference.names if self.judged_outputs is None else self.judged_outputs
        kept = [i for i, name in enumerate(self.reference.names) if name in judged]
        alike: list[int] = []

        def compared(metric: str | None) -> Fidelity:
            alike.clear()
            reference = ([want[k] for k in kept] for want in self.reference.outputs)
            outputs = ([got[k] for k in kept] for got in noting_shapes())
            return compare(reference, outputs, names, self.samples.labels, metric)

        def noting_shapes() -> Iterator[Outputs]:
            outputs = chain.from_iterable(run_each(*run) for run in runs)
            for i, got in enumerate(islice(outputs, len(self.samples))):
                if [x.shape for x in got] == self.reference.outputs.shapes[i]:
                    alike.append(i)
                yield got

        names = [self.reference.names[k] for k in kept]
        failure = None
        try:
            fidelity = compared(self.metric)
        except DataError as error:
            if self.metric is None:
                raise
            failure = error
            fidelity = compared(None)
        size_ratio = candidate.size_bytes / self.float_size_bytes
        found = replace(candidate, fidelity=fidelity, size_ratio=size_ratio, metric_failure=failure)
        return found, alike

    def described(self, plan: QuantPlan, feed: Feed) -> str:
        """What the plan makes of the float model, and the feed that it is timed on: a key of the
        timing cache.
        """
        by = digest_of(plan.to_json().encode())
        what = f"{model_on(self.costs.digest_of(self.reference.path), feed)} by plan {by}"
        if self.timed_in is Runtime.OPENVINO:
            return f"{what} in OpenVINO {openvino_version()}"
        return what

    def _cost(
        self, candidate: Candidate, session: ort.InferenceSession, feed: Feed, which: str = ""
    ) -> Cost | None:
        """The cost on this feed; None if the float model does not run where it would be timed."""
        what = f"{self.described(candidate.plan, feed)} {which}".rstrip()
        if self.timed_in is Runtime.OPENVINO:
            original = self.reference.path
            seconds = IN_A_PROCESS * self.seconds
            race = partial(race_in_openvino, original, candidate.model, feed, seconds)
            try:
                return self.costs.of(what, race)
            except ModelError as error:
                if error.where == str(original):
                    return None
                raise
        in_float = self.reference.session
        race = partial(
            measure, in_float, session, feed, seconds=self.seconds, clock=time.thread_time
        )
        return self.costs.of(what, race)


def _is_repeated(output: OutputFidelity) -> bool:
    """Whether float gave an output again; a few integers that differ prove nothing."""
    near = output.upper_integer_db if output.sqnr_db is None else output.sound_db
    return not output.flaw and (near is None or near >= POLICY.faithful_db)


def model_on(digest: str, feed: Feed) -> str:
    """How keys of the timing cache begin: the float model of that digest, and shapes of a feed."""
    shapes = {name: list(x.shape) for name, x in feed.items()}
    return f"model {digest} on {shapes}"


def _run_in_time(
    session: ort.InferenceSession, samples: Samples, deadline: Deadline
) -> tuple[Samples, StoredOutputs]:
    """The samples that the model ran on until the deadline, and its outputs."""
    ran: list[int] = []

    def outputs() -> Iterator[Outputs]:
        for i, feed in enumerate(samples):
            try:
                found = run(session, feed, samples.where(i))
            except ModelError:
                is_last_chance = not ran and i == len(samples) - 1
                if not samples.are_random or is_last_chance:
                    raise
                continue
            ran.append(i)
            yield found

    stored = StoredOutputs(deadline.limit(outputs()))
    return (samples if len(ran) == len(samples) else samples.pick(np.array(ran))), stored

"""What one plan is worth: the model it makes, how faithful that is, and how fast."""

from __future__ import annotations

import hashlib
import math
import time
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from quant_core.data.samples import Samples
from quant_core.errors import DataError
from quant_core.evaluate.fidelity import compare, run_all
from quant_core.evaluate.timing import measure
from quant_core.evaluate.timing_cache import Cost, TimingCache
from quant_core.metrics import Fidelity
from quant_core.model.session import open_session
from quant_core.plan.types import Compute, QuantPlan
from quant_core.rewrite.apply import Quantized

AS_FAST = 0.97  # paired medians within 3 % are noise
FAITHFUL_DB = 30.0  # outputs this close to float's are as good as equal
DOUBLINGS_PER_10_DB = 0.6  # what the first 10 dB below that must buy; it grows with the square


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """One plan, the model it makes, and what that model is worth."""

    name: str
    plan: QuantPlan
    quantized: Quantized
    size_bytes: int
    fidelity: Fidelity | None = None
    cost: Cost | None = None

    @property
    def model(self) -> ir.Model:
        """The quantized model."""
        return self.quantized.model

    @property
    def speedup(self) -> float | None:
        """Over float, None where it cannot be timed."""
        return self.cost.speedup if self.cost is not None else None

    @property
    def sqnr_db(self) -> float:
        """Of the worst output, 200 where there is nothing to compare."""
        if self.fidelity is None:
            return 200.0
        return min(
            (o.sqnr_db for o in self.fidelity.per_output if o.sqnr_db is not None), default=200.0
        )

    @property
    def noise(self) -> float:
        """Noise over signal of the worst output."""
        return float(10 ** (-self.sqnr_db / 10))

    @property
    def worth(self) -> float:
        """Speed gained, in doublings, less what the lost fidelity would have to buy.

        Outputs 10 dB below FAITHFUL_DB must buy a speed-up of 1.5, 20 dB below of 5; a model slower than its float
        original is worth less than any that is not.
        """
        missing = max(0.0, FAITHFUL_DB - self.sqnr_db) / 10
        slow = 0.0 if self.gain >= math.log2(AS_FAST) else 10.0
        return self.gain - DOUBLINGS_PER_10_DB * missing**2 - slow

    @property
    def gain(self) -> float:
        """Speed gained over float, in doublings."""
        return math.log2(
            max(self._expected_speedup() if self.speedup is None else self.speedup, 1e-3)
        )

    def _expected_speedup(self) -> float:
        """For a CPU of another kind, where nothing can be timed: integers take half of float's time."""
        weighted = [n for n in self.plan.nodes if n.weights]
        integer = sum(n.elements for n in weighted if n.compute != Compute.FLOAT)
        return 1 / (1 - 0.5 * integer / max(1, sum(n.elements for n in weighted)))

    def trace(self) -> dict[str, Any]:
        """One row of what was tried."""
        assert self.fidelity is not None
        return {"candidate": self.name, "speedup": self.speedup, "sqnr_db": self.sqnr_db,
                "agreement": self.fidelity.agreement, "size_bytes": self.size_bytes}  # fmt: skip


@dataclass(slots=True)
class Bench:
    """The float model's answers and a session to race against: what every candidate is held to."""

    float_path: Path
    samples: Samples
    float_size_bytes: int
    metric: str | None = None
    seconds: float = 0.1
    costs: TimingCache = field(default_factory=TimingCache)
    is_host: bool = (
        True  # models are for CPUs like this one, so that their speed can be measured here
    )
    metric_failure: DataError | None = (
        None  # of a metric of the user's own; fidelity is judged without it then
    )
    _session: Any = field(init=False)
    _digest: str = field(init=False)
    _reference: list[list[NDArray[Any]]] = field(init=False)

    def __post_init__(self) -> None:
        self._session = open_session(self.float_path)
        self._digest = _digest(self.float_path.read_bytes()) if self.costs.path is not None else ""
        self._reference = run_all(self._session, self.samples)

    def judge(self, candidate: Candidate, *, timed: bool = True) -> Candidate:
        """The candidate with its fidelity and, if timed, its speed-up."""
        session = open_session(candidate.model)
        names = [o.name for o in session.get_outputs()]
        outputs = run_all(session, self.samples)
        try:
            fidelity = compare(self._reference, outputs, names, self.samples.labels, self.metric)
        except DataError as failure:
            if self.metric is None:
                raise
            self.metric, self.metric_failure = None, failure
            fidelity = compare(self._reference, outputs, names, self.samples.labels)
        cost = self._cost(candidate.plan, session) if timed and self.is_host else candidate.cost
        return replace(candidate, fidelity=fidelity, cost=cost)

    def _cost(self, plan: QuantPlan, session: ort.InferenceSession) -> Cost:
        feed = self.samples[0]
        shapes = {name: list(x.shape) for name, x in feed.items()}
        what = f"model {self._digest} on {shapes} by plan {_digest(plan.to_json().encode())}"
        race = partial(
            measure, self._session, session, feed, seconds=self.seconds, clock=time.thread_time
        )
        return self.costs.of(what, race)


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()

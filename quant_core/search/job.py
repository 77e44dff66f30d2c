"""One model to quantize: what it is made of, what it is judged by, and the time there is."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import onnx_ir as ir

from quant_core.calibrate.observe import Statistics
from quant_core.config import Contract, Mode, QuantConfig
from quant_core.data.samples import Samples
from quant_core.deadline import NO_DEADLINE, Deadline, Progress, silent
from quant_core.evaluate.timing_cache import TimingCache
from quant_core.plan.types import QuantPlan
from quant_core.search.policy import POLICY


@dataclass(frozen=True, slots=True, eq=False)
class QuantJob:
    """One model to quantize.

    model             the prepared float model
    original          the float model's file
    float_size_bytes  of that file and its external data
    plan              what statistics were measured for
    stats             of the calibration samples; None without calibration
    samples           the calibration samples; without stats there was no time to calibrate
    evaluation        the samples that candidates are judged by; may be those of calibration
    costs             what was timed before, and what will be
    whole_front       whether all plans are tried that may be on the front
    deadline          when all work on the model should end
    fitted_stats      of those calibration samples that do not judge (judges.py), where some were
                      held out; `stats` are of all
    """

    model: ir.Model
    original: Path
    float_size_bytes: int
    plan: QuantPlan
    stats: Statistics | None = None
    samples: Samples | None = None
    evaluation: Samples | None = None
    contract: Contract | None = None
    costs: TimingCache = field(default_factory=TimingCache)
    progress: Progress = silent
    whole_front: bool = False
    deadline: Deadline = NO_DEADLINE
    fitted_stats: Statistics | None = None

    @property
    def stage_deadline(self) -> Deadline:
        """When a stage before the search should end that begins now."""
        return self.deadline.of_stage(POLICY.stage_share)


def deadline_of(size_bytes: int, config: QuantConfig, spent_s: float = POLICY.start_s) -> Deadline:
    """When the search for a model of that size should end, of whose time `spent_s` are gone: then
    there is time to check, to write and to time what it found.
    """
    budget_s = config.time_budget_s
    if budget_s is None:
        budget_s = POLICY.budget_s * max(1.0, size_bytes / 100e6)
    return Deadline.after((1 - POLICY.finish_share) * budget_s, spent_s)


def has_time_to_calibrate(config: QuantConfig, deadline: Deadline) -> bool:
    """Whether samples are observed, if there are any; what is static cannot do without."""
    return config.mode == Mode.STATIC or not deadline.is_past(POLICY.late)

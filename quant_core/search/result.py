"""What was made of a model: from a candidate to the file, and a report on each of its nodes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from quant_core.errors import ModelError
from quant_core.evaluate.contract import Ruling
from quant_core.evaluate.layer_report import layer_reports
from quant_core.evaluate.node_noise import measure_sensitivity
from quant_core.evaluate.sensitivity import Sensitivity
from quant_core.metrics import Fidelity
from quant_core.model import files
from quant_core.model.write import write_copy, write_model
from quant_core.optimize.applied import REWRITES, to_text
from quant_core.plan.types import QuantPlan
from quant_core.search.candidate import Candidate
from quant_core.search.job import QuantJob
from quant_core.search.notes import size_note
from quant_core.search.policy import POLICY
from quant_core.search.trace import MeasuredRow, TrialRow, on_front
from quant_core.text import joined


@dataclass(frozen=True, slots=True, eq=False)
class Made:
    """The model that is to be written, the float model that it was made of, and why it is as it is.

    fidelity   of its outputs, as they were checked; None if none could be
    unchecked  whether no sample could be drawn to check it with
    shortfall  which outputs are below the floor, "" if none is
    """

    job: QuantJob
    best: Candidate
    float_model: ir.Model
    fidelity: Fidelity | None
    unchecked: bool
    shortfall: str
    ruling: Ruling
    note: str
    trace: list[TrialRow]

    def sensitivities(self) -> list[Sensitivity]:
        """What each node costs, measured on a few of the evaluation samples; empty without any,
        without the time for it, and where a part of the model does not run by itself.
        """
        takes_s = POLICY.trials_of_a_step * self.best.seconds
        if self.job.evaluation is None or not self.job.deadline.allows(takes_s):
            return []
        few = self.job.evaluation.subsample(POLICY.sensitivity_samples)
        try:
            return measure_sensitivity(self.float_model, self.best.model, few)
        except ModelError:  # the model is made and checked: this only reports
            return []


@dataclass(frozen=True, slots=True)
class QuantResult:
    """What was written, and why it is as it is. Sizes are in bytes.

    floor_db   least SQNR of each output that the file was held to
    worst_db   SQNR of its worst output around its mean in dB, 200 if all equal float's; None if not
               checked. Probabilities that hardly differ may be below the floor
    lower_db   a lower bound of it, with 95 % confidence, for a few other samples of the same kind
    unchecked  whether no sample could be drawn to check it with
    shortfall  which outputs are below the floor, and then the verdict is not_met; "" if none is
    layers     one row for each node
    trace      one row for each trial of the search
    front      those rows of the trace that no other beats in speed, SQNR and size, fastest first
    chosen     which trial was written
    note       what makes the result doubtful, "" if nothing
    """

    output: str
    size_bytes: int
    float_size_bytes: int
    target: str
    saturation_safe: bool
    floor_db: float
    worst_db: float | None
    lower_db: float | None
    unchecked: bool
    shortfall: str
    verdict: str
    reason: str
    note: str
    plan: QuantPlan
    layers: list[dict[str, Any]]
    trace: list[TrialRow]
    front: list[MeasuredRow]
    chosen: str

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        own = {name: getattr(self, name) for name in self.__slots__}
        return own | {
            "plan": self.plan.to_dict(),
            "size_ratio": self.size_bytes / self.float_size_bytes,
        }


def write_result(
    made: Made, output: Path, sensitivities: Iterable[Sensitivity] = ()
) -> QuantResult:
    """Writes the model to `output` at once or not at all, and reports on each node.

    Where nothing is stored in fewer bits and the file would grow, it is the original.
    """
    job, plan, model, checked = made.job, made.best.plan, made.best.model, made.fidelity
    layers = layer_reports(plan, made.best.quantized, sensitivities, job.stats)
    is_safe = all(row.saturation_safe for row in layers)
    # Nothing of how it was found: a plan that is replayed makes the same bytes.
    properties = {"target": plan.target, "saturation_safe": str(is_safe).lower()}
    model.metadata_props.update({f"quantmill.{k}": v for k, v in properties.items()})
    if plan.rewrites:
        model.metadata_props[REWRITES] = to_text(plan.rewrites)
    if not plan.stores_less and files.size_in_file(model) > job.float_size_bytes:
        size_bytes = write_copy(job.original, output)
    else:
        size_bytes = write_model(model, output)
    return QuantResult(
        output=str(output),
        size_bytes=size_bytes,
        float_size_bytes=job.float_size_bytes,
        target=plan.target,
        saturation_safe=is_safe,
        floor_db=plan.config.least_db,
        worst_db=checked.measured_db if checked is not None else None,
        lower_db=checked.measured_lower_db if checked is not None else None,
        unchecked=made.unchecked,
        shortfall=made.shortfall,
        verdict=made.ruling.verdict,
        reason=made.ruling.reason,
        note=joined([made.note, size_note(size_bytes, job.float_size_bytes)]),
        plan=plan,
        layers=[asdict(row) for row in layers],
        trace=made.trace,
        front=sorted(on_front(made.trace), key=lambda trial: -trial["speedup"]),
        chosen=made.best.label,
    )

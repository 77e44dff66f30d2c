"""From a prepared model and its statistics to a file and a report: choose judges, search, write.

job    = QuantJob(...)                                     # what is quantized, and by what
made   = quantize_by_search(job) or quantize_by_plan(job)  # the model, and why it is as it is
result = write_result(made, output)                        # the file, and a row for each node
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from quant_core.calibrate.observe import Statistics
from quant_core.config import Contract, QuantConfig
from quant_core.data.samples import Samples, input_specs, open_samples, spread
from quant_core.data.spec import SampleSpec
from quant_core.deadline import NO_DEADLINE, Deadline
from quant_core.errors import DataError, ModelError, RequestError
from quant_core.evaluate.contract import Verdict
from quant_core.evaluate.fidelity import run_each
from quant_core.evaluate.layer_report import layer_reports
from quant_core.evaluate.node_noise import measure_sensitivity
from quant_core.evaluate.sensitivity import Sensitivity
from quant_core.evaluate.timing_cache import TimingCache
from quant_core.model import files, graph
from quant_core.model.info import model_info
from quant_core.model.prepare import OPSET_INT4, raise_opset
from quant_core.model.session import find_provider, open_session
from quant_core.model.write import write_copy, write_model
from quant_core.optimize.applied import REWRITES, Applied, to_text
from quant_core.plan.make import make_plan
from quant_core.plan.operators import RULES
from quant_core.plan.targets import TARGETS, find_target
from quant_core.plan.types import Compute, NodeChoice, QuantPlan
from quant_core.search.calibrated import CalibratedModel, uses_gptq
from quant_core.search.candidate import Bench, Candidate, Reference
from quant_core.search.floor import check_floor
from quant_core.search.front import on_front
from quant_core.search.mixed_precision import IN_INT8, with_choice
from quant_core.search.not_larger import not_larger
from quant_core.search.notes import (
    float_weights_note,
    idle_glob_notes,
    joined,
    size_note,
    speed_note,
    time_note,
    with_reasons,
)
from quant_core.search.policy import POLICY
from quant_core.search.prepared import is_for_host
from quant_core.search.search import Found, follow_plan, search


@dataclass(frozen=True, slots=True, eq=False)
class QuantJob:
    """One model to quantize.

    model       the prepared float model
    original    the float model's file
    plan        what statistics were measured for
    stats       of the calibration samples; None without calibration
    samples     the calibration samples; without stats there was no time to calibrate
    evaluation  the samples that candidates are judged by; may be those of calibration
    costs       what was timed before, and what will be
    whole_front whether all plans are tried that may be on the front
    deadline    when all work on the model should end
    """

    model: ir.Model
    original: Path
    plan: QuantPlan
    stats: Statistics | None = None
    samples: Samples | None = None
    evaluation: Samples | None = None
    contract: Contract | None = None
    costs: TimingCache = field(default_factory=TimingCache)
    progress: Callable[[str], None] = lambda _: None
    whole_front: bool = False
    deadline: Deadline = NO_DEADLINE
    float_size_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "float_size_bytes", model_info(self.original).size_bytes)


@dataclass(frozen=True, slots=True, eq=False)
class Judging:
    """Which samples weights are fitted to, and which candidates are judged by.

    is_held_out  whether the judges were split off the calibration samples; what they choose is then
                 fitted to all of those
    drawn        random ones where no sample is given: ways are timed on them, and the file checked
    note         what makes the judgement doubtful, "" if nothing
    """

    fitted: Samples | None
    judges: Samples | None
    is_held_out: bool = False
    drawn: Samples | None = None
    note: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Made:
    """The model that is to be written, the float model that it was made of, and why it is as it is.

    original   the file of the float model
    judges     the samples that it was judged by
    deadline   when its sensitivities should be known
    worst_db   SQNR of its worst output in dB, None if that was not checked
    unchecked  whether no sample could be drawn to check it with
    shortfall  which outputs are below the floor, "" if none is
    """

    best: Candidate
    float_model: ir.Model
    original: Path
    float_size_bytes: int
    judges: Samples | None
    deadline: Deadline
    worst_db: float | None
    unchecked: bool
    shortfall: str
    verdict: Verdict
    reason: str
    note: str
    trace: list[dict[str, Any]]
    stats: Statistics | None

    def sensitivities(self) -> list[Sensitivity]:
        """What each node costs, measured on a few of the judges; empty without any, and without
        the time for it.
        """
        takes_s = POLICY.trials_of_a_step * self.best.seconds
        if self.judges is None or not self.deadline.allows(takes_s):
            return []
        few = self.judges.subsample(POLICY.sensitivity_samples)
        return measure_sensitivity(self.float_model, self.best.model, few)


@dataclass(frozen=True, slots=True)
class QuantResult:
    """What was written, and why it is as it is. Sizes are in bytes.

    floor_db   least SQNR of each output that the file was held to
    worst_db   SQNR of its worst output in dB, None if that was not checked
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
    unchecked: bool
    shortfall: str
    verdict: str
    reason: str
    note: str
    plan: QuantPlan
    layers: list[dict[str, Any]]
    trace: list[dict[str, Any]]
    front: list[dict[str, Any]]
    chosen: str

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        own = {name: getattr(self, name) for name in self.__slots__}
        return own | {
            "plan": self.plan.to_dict(),
            "size_ratio": self.size_bytes / self.float_size_bytes,
        }


def quantize_by_search(job: QuantJob) -> Made:
    """The best model that the job's config allows.

    Weights in 4 bits are fitted to the samples so closely that these cannot judge them. Without
    others, a contract is judged by a part held out, and what wins is then fitted to all samples.

    Raises: DataError if there is a contract and nothing to judge by, ModelError if nothing runs.
    """
    plan, why = storable_plan(job)
    judging = hold_out_judges(job) if _needs_hold_out(job, plan) else choose_judges(job)
    calibrated = _calibrated(job, plan, judging)
    bench = _bench(job, plan, judging)
    if bench is None:
        found = follow_plan(calibrated, plan, None)
    else:
        found = search(
            calibrated,
            plan,
            bench,
            job.contract,
            whole_front=job.whole_front,
            progress=job.progress,
        )
    if judging.is_held_out:
        job.progress("fitting all samples")
        found = _fitted_to(found, job.samples)
    return _made(job, judging, bench, found, why, repairs=True)


def quantize_by_plan(job: QuantJob) -> Made:
    """What the job's plan makes, and nothing else; it is judged if there is a contract.

    Raises: as `quantize_by_search`.
    """
    plan, why = storable_plan(job)
    judging = choose_judges(job)
    calibrated = _calibrated(job, plan, judging)
    bench = _bench(job, plan, judging) if job.contract is not None else None
    if plan.equalized_db:
        calibrated = calibrated.equalized(plan, job.deadline) or calibrated
    found = follow_plan(calibrated, plan, bench, job.contract)
    return _made(job, judging, bench, found, why, repairs=False)


def write_result(
    made: Made, output: Path, sensitivities: Iterable[Sensitivity] = ()
) -> QuantResult:
    """Writes the model to `output` at once or not at all, and reports on each node.

    Where nothing is stored in fewer bits and the file would grow, it is the original.
    """
    plan, model = made.best.plan, made.best.model
    layers = layer_reports(plan, made.best.quantized, sensitivities, made.stats)
    is_safe = all(row.saturation_safe for row in layers)
    # Nothing of how it was found: a plan that is replayed makes the same bytes.
    properties = {"target": plan.target, "saturation_safe": str(is_safe).lower()}
    model.metadata_props.update({f"quantmill.{k}": v for k, v in properties.items()})
    if plan.rewrites:
        model.metadata_props[REWRITES] = to_text(plan.rewrites)
    if not plan.stores_less and files.size_in_file(model) > made.float_size_bytes:
        size_bytes = write_copy(made.original, output)
    else:
        size_bytes = write_model(model, output)
    return QuantResult(
        output=str(output),
        size_bytes=size_bytes,
        float_size_bytes=made.float_size_bytes,
        target=plan.target,
        saturation_safe=is_safe,
        floor_db=float(plan.config.floor.min or 0.0),
        worst_db=made.worst_db,
        unchecked=made.unchecked,
        shortfall=made.shortfall,
        verdict=made.verdict,
        reason=made.reason,
        note=made.note,
        plan=plan,
        layers=[asdict(row) for row in layers],
        trace=made.trace,
        front=sorted(on_front(made.trace), key=lambda trial: -trial["speedup"]),
        chosen=made.best.label,
    )


def deadline_of(path: str | Path, config: QuantConfig, spent_s: float = POLICY.start_s) -> Deadline:
    """When the work on the model of that file should end, of whose time `spent_s` are gone."""
    budget_s = config.time_budget_s
    if budget_s is None:
        budget_s = POLICY.budget_s * max(1.0, model_info(path).size_bytes / 100e6)
    return Deadline.after(budget_s, spent_s)


def has_time_to_calibrate(config: QuantConfig, deadline: Deadline) -> bool:
    """Whether samples are observed, if there are any; what is static cannot do without."""
    return config.mode == "static" or not deadline.is_past(POLICY.late)


def first_plan(
    model: ir.Model, config: QuantConfig, *, measured: bool, rewrites: Sequence[Applied] = ()
) -> QuantPlan:
    """The plan that calibration covers: in mode auto all that may become static in a variant.

    measured  whether there are samples to measure ranges on
    rewrites  how the model was rewritten after it was prepared

    Raises: RequestError if static is requested without samples; as `make_plan`.
    """
    if config.mode == "static" and not measured:
        raise RequestError(
            "is static, which needs calibration",
            "mode",
            "Give data, or mode dynamic or weight_only",
        )
    target = find_target(config.target)
    plan = make_plan(model, config, target, rewrites=rewrites)
    if config.mode != "auto" or measured:
        return plan
    choices = {}
    for node in plan.nodes:
        if node.weights:
            can_be_dynamic = RULES[node.op_type].dynamic and Compute.DYNAMIC in target.times
            choices[node.node] = NodeChoice(Compute.DYNAMIC if can_be_dynamic else Compute.FLOAT)
    return make_plan(model, config, target, choices, rewrites=rewrites)


def storable_plan(job: QuantJob) -> tuple[QuantPlan, str]:
    """The plan that the model can hold, and why 4 bits become 8 in it or later in the search.

    Whether a model of an older opset can hold 4 bits is known only by converting it: ONNX's
    converter has no dry run. No weight is copied for that.

    Raises: ModelError if the model cannot hold 4 bits and no contract allows others.
    """
    four = job.plan.in_four_bits
    if four and graph.opset(job.model) < OPSET_INT4:
        try:
            raise_opset(job.model, OPSET_INT4)
        except ModelError as error:
            if job.contract is None:
                hint = f"{error.hint}, or ask for 8 bits, or a contract"
                raise ModelError(error.problem, four[0], hint) from error
            return with_choice(job.model, job.plan, four, IN_INT8), error.problem
    return job.plan, "4 bits break the contract"


def choose_judges(job: QuantJob) -> Judging:
    """All calibration samples to fit to, and the evaluation samples to judge by.

    Where no labels and no contract need all of them, a few tell candidates apart.

    Raises: DataError if there is a contract and nothing to judge by.
    """
    if job.contract is not None and job.evaluation is None:
        raise DataError(
            "a contract needs samples to judge by",
            str(job.original),
            "Give evaluation or calibration data",
        )
    judges, note = job.evaluation, ""
    judged_by_calibration = _judges_by_calibration_samples(job)
    if judged_by_calibration:
        note = "the contract was judged by the samples that ranges were measured on"
    few_are_enough = job.contract is None or judged_by_calibration
    if judges is not None and judges.labels is None and few_are_enough:
        judges = judges.subsample(_enough_samples(job))
    drawn = _drawn_samples(job) if judges is None and job.samples is None else None
    return Judging(job.samples, judges, drawn=drawn, note=note)


def hold_out_judges(job: QuantJob) -> Judging:
    """Some calibration samples to judge by, the others to fit to."""
    assert job.samples is not None
    fitted, judges = job.samples.split_holdout(POLICY.holdout)
    if judges.labels is None:
        judges = judges.subsample(_enough_samples(job))
    note = f"the contract was judged by {len(judges)} samples held out of calibration"
    return Judging(fitted, judges, is_held_out=True, note=note)


def _enough_samples(job: QuantJob) -> int:
    """How many samples without labels candidates are judged by."""
    return POLICY.judging_samples if job.contract is None else POLICY.contract_samples


def own_metric(*metrics: str | None) -> str | None:
    """The first of these that is a metric of the user's own, "module:function"; None if none is."""
    return next((metric for metric in metrics if metric is not None and ":" in metric), None)


def _judges_by_calibration_samples(job: QuantJob) -> bool:
    """Whether a contract is to be judged by the samples that ranges were measured on."""
    if job.contract is None or job.samples is None or job.evaluation is None:
        return False
    return job.evaluation.same_feeds(job.samples)


def _needs_hold_out(job: QuantJob, plan: QuantPlan) -> bool:
    """Whether 4-bit weights are fitted to the samples that would judge, and there are enough."""
    if not plan.in_four_bits or not uses_gptq(plan) or not _judges_by_calibration_samples(job):
        return False
    return job.samples is not None and len(job.samples) >= 2 * POLICY.holdout


def _calibrated(job: QuantJob, plan: QuantPlan, judging: Judging) -> CalibratedModel:
    if job.stats is None:
        return CalibratedModel(job.model)
    job.progress("measuring how inputs vary together")
    calibrated = CalibratedModel(job.model, judging.fitted, job.stats)
    return calibrated.with_gram_matrices(plan, job.deadline.of_stage(POLICY.stage_share))


def _bench(job: QuantJob, plan: QuantPlan, judging: Judging) -> Bench | None:
    """What judges candidates: on the judges, or on drawn samples where models can be built many
    times; None without either.
    """
    samples = judging.judges
    if samples is None and not files.is_large(job.model):
        samples = judging.drawn
    if samples is None:
        return None
    is_labelled = samples.labels is not None
    ends = job.deadline.of_stage(POLICY.stage_share)
    reference = Reference.run(job.original, samples, ends)
    return Bench(
        reference,
        job.float_size_bytes,
        own_metric(job.contract.metric if job.contract is not None else None),
        costs=job.costs,
        is_host=is_for_host(plan.target),
        deadline=job.deadline,
        judged_outputs=None if is_labelled or job.contract is not None else reference.steady,
    )


def _floor_bench(
    job: QuantJob, plan: QuantPlan, judging: Judging, bench: Bench | None
) -> Bench | None:
    """What checks the finished file, on given samples or on drawn ones; None if none fit.

    It is the bench of the search where labels and contracts do not make that one judge otherwise.
    """
    if bench is not None and bench.judged_outputs is not None:
        return bench
    if bench is not None:
        few = spread(POLICY.floor_samples, len(bench.samples))
        reference = bench.reference.pick(few)
        reference = replace(reference, samples=replace(reference.samples, labels=None))
    else:
        samples = judging.judges or job.samples or judging.drawn
        if samples is None:
            return None
        few_samples = replace(samples.subsample(POLICY.floor_samples), labels=None)
        reference = Reference.run(job.original, few_samples, job.deadline)
    return Bench(
        reference,
        job.float_size_bytes,
        costs=job.costs,
        is_host=is_for_host(plan.target),
        deadline=job.deadline,
        judged_outputs=reference.steady,
    )


def _drawn_samples(job: QuantJob) -> Samples | None:
    """A few random samples that the original runs on; None if none fit."""
    drawn = SampleSpec(count=POLICY.drawn_samples)
    try:
        samples = open_samples(drawn, input_specs(job.original), job.original)
        for _ in run_each(open_session(job.original), samples):
            pass
    except (DataError, ModelError):
        return None
    return samples


def _fitted_to(found: Found, samples: Samples | None) -> Found:
    """What was found, with its weights fitted to all these samples."""
    best = found.best
    calibrated = replace(found.calibrated, samples=samples).with_gram_matrices(best.plan)
    quantized = calibrated.build(best.plan, best.label).quantized
    refitted = replace(best, quantized=quantized, fidelity=None)
    return replace(found, best=calibrated.with_tuned_biases(refitted), calibrated=calibrated)


def _made(
    job: QuantJob,
    judging: Judging,
    bench: Bench | None,
    found: Found,
    why: str,
    *,
    repairs: bool,
) -> Made:
    """The result of a job, checked, and without the statistics, which are large."""
    job.progress("checking the outputs")
    floor_bench = _floor_bench(job, found.best.plan, judging, bench)
    best = found.best if floor_bench is bench else replace(found.best, fidelity=None)
    limits_size = repairs and not (job.contract is not None and job.contract.min_speedup)
    if limits_size:
        best = not_larger(found.calibrated, best, job.float_size_bytes)
    checked = check_floor(
        found.calibrated,
        best,
        floor_bench,
        contract=job.contract,
        repairs=repairs,
        progress=job.progress,
    )
    if limits_size:  # weights that were promoted take more bytes
        best = not_larger(found.calibrated, checked.best, job.float_size_bytes)
        checked = replace(checked, best=best)
    verdict, reason = found.verdict, found.reason
    if checked.shortfall:
        verdict, reason = Verdict.NOT_MET, checked.shortfall
    best = replace(checked.best, plan=with_reasons(checked.best.plan, job.plan, why))
    fidelity_note = found.best.fidelity.note if found.best.fidelity is not None else ""
    notes = [
        fidelity_note,
        judging.note,
        time_note(job.samples, job.stats, judging.judges, bench),
        speed_note(best),
        TARGETS[best.plan.target].note,
        find_provider(best.plan.config.provider)[1] if job.stats is not None else "",
        size_note(best, job.float_size_bytes),
        *checked.notes,
        float_weights_note(found.calibrated.model, best.plan),
        *idle_glob_notes(found.calibrated.model, job.plan),
    ]
    return Made(
        best=best,
        float_model=found.calibrated.model,
        original=job.original,
        float_size_bytes=job.float_size_bytes,
        judges=judging.judges,
        deadline=job.deadline,
        worst_db=checked.worst_db,
        unchecked=floor_bench is None,
        shortfall=checked.shortfall,
        verdict=verdict,
        reason=reason,
        note=joined(notes),
        trace=[*found.trace, *(trial.row() for trial in checked.trials)],
        stats=job.stats,
    )

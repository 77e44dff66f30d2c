"""What Python callers use: one function for each thing that a person does with a model."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ContextDecorator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from threadpoolctl import threadpool_limits

from quant_core.answers import Compared, ExplainedKernel, Explanation, OptimizeResult, Validation
from quant_core.calibrate.observe import observe
from quant_core.config import Contract, QuantConfig
from quant_core.data.inputs import fixed_specs, input_specs, sizes_of
from quant_core.data.samples import Samples, open_samples
from quant_core.data.spec import RANDOM, SampleShape, SampleSource, SampleSpec
from quant_core.deadline import NO_DEADLINE, Progress, silent
from quant_core.errors import DataError, ModelError
from quant_core.evaluate.contract import Verdict, judge
from quant_core.evaluate.custom_metric import code_allowed, own_metric
from quant_core.evaluate.fidelity import compare
from quant_core.evaluate.kernels import profile_kernels
from quant_core.evaluate.node_noise import measure_sensitivity
from quant_core.evaluate.outputs import Outputs, StoredOutputs, run_each
from quant_core.evaluate.saturation_check import saturating_nodes
from quant_core.evaluate.timing import Timing, measure, measure_all
from quant_core.evaluate.timing_cache import TimingCache
from quant_core.metrics import Fidelity
from quant_core.model import files, graph
from quant_core.model.info import model_info
from quant_core.model.normalize import load_normalized, normalize
from quant_core.model.prepare import STAYS_FLOAT, prepare
from quant_core.model.session import find_provider, open_session
from quant_core.model.write import sign, write_model
from quant_core.optimize.applied import REWRITES, from_text, to_text
from quant_core.optimize.run import follow
from quant_core.plan.types import NodePlan, QuantPlan
from quant_core.search.checks import check_output, check_plan, check_same_interface
from quant_core.search.first_plan import first_plan
from quant_core.search.job import QuantJob, deadline_of, has_time_to_calibrate
from quant_core.search.notes import joined
from quant_core.search.pipeline import quantize_by_plan, quantize_by_search
from quant_core.search.policy import POLICY
from quant_core.search.prepared import prepare_as_planned, prepare_optimized, prepare_samples
from quant_core.search.result import QuantResult, write_result

# Whether numbers are finite is checked where it matters; numpy's warnings name no model.
QUIET = np.errstate(all="ignore")
# Rounding multiplies many small matrices: BLAS threads that wait for each other take twice the CPU
# time for hardly less of the clock's, and all of both on a machine that does other work too.
ONE_BLAS_THREAD: ContextDecorator = threadpool_limits.wrap(limits=1, user_api="blas")


def quantize(
    input_path: str | Path,
    output_path: str | Path,
    bits: int = 8,
    per_channel: bool = True,
    **options: Any,
) -> QuantResult:
    """A smaller model without calibration; activations are quantized at run time if that is faster.

    bits         of stored weights: 8, or 4 in blocks
    per_channel  whether each output channel of a weight has a scale of its own
    options      fields of QuantConfig

    Raises: QuantError.
    """
    config = QuantConfig.from_dict({"bits": bits, "per_channel": per_channel, **options})
    return quantize_model(input_path, output_path, config)


def quantize_with_calibration(
    input_path: str | Path,
    output_path: str | Path,
    calibration_data: SampleSource | None = None,
    bits: int = 8,
    per_channel: bool = True,
    method: str = "auto",
    num_samples: int = 100,
    sample_shape: SampleShape | None = None,
    **options: Any,
) -> QuantResult:
    """A model that computes in integers, with ranges measured on `calibration_data`.

    calibration_data   what a SampleSpec takes as source; None for random samples
    bits, per_channel  as in `quantize`
    method             how the range of an activation is chosen
    num_samples        at most so many samples, spread evenly over the data
    sample_shape       of random samples, where the model leaves sizes open
    options            fields of QuantConfig

    Raises: QuantError.
    """
    config = QuantConfig.from_dict(
        {"bits": bits, "per_channel": per_channel, "method": method, **options}
    )
    source = RANDOM if calibration_data is None else calibration_data
    return quantize_model(
        input_path,
        output_path,
        config,
        calibration=SampleSpec(source, count=num_samples, shape=sample_shape),
    )


@QUIET
def plan_model(
    path: str | Path,
    config: QuantConfig | None = None,
    samples: SampleSource | SampleSpec | None = None,
) -> QuantPlan:
    """The plan for a model, without quantizing it; only with `samples` nodes may be static.

    Raises: QuantError.
    """
    config = config or QuantConfig()
    feeds = None if samples is None else _open(path, samples, sizes=config.fix_shape)
    prepared = prepare_optimized(path, config, feeds, TimingCache())
    measured = feeds is not None
    return first_plan(prepared.model, config, measured=measured, rewrites=prepared.applied)


@QUIET
@ONE_BLAS_THREAD
def quantize_model(
    path: str | Path,
    output: str | Path,
    config: QuantConfig | None = None,
    *,
    calibration: SampleSource | SampleSpec | None = None,
    evaluation: SampleSource | SampleSpec | None = None,
    contract: Contract | None = None,
    plan: QuantPlan | None = None,
    costs: str | Path | None = None,
    progress: Callable[[str], None] = lambda _: None,
    allow_code: str | Path | None = None,
    whole_front: bool = False,
) -> QuantResult:
    """The best model that `config` allows, written to `output` at once or not at all.

    calibration  samples that ranges are measured on; without any, nothing computes in static int8
    evaluation   samples that candidates are judged by: all of them if there is a contract or they
                 have labels; None for those of the calibration
    plan         is followed exactly, nothing is searched: a dry run's, or that of a result
    costs        file of the timing cache, read and added to: with all in it, the same bytes again
    allow_code   the folder from which a metric "module:function" is imported; None: none runs
    whole_front  whether all assignments of integers and float are tried that are cheapest for some
                 price of noise, for the result's `front`; takes longer

    Raises: QuantError.
    """
    config = plan.config if plan is not None else config or QuantConfig()
    output = check_output(path, output)
    size_bytes = model_info(path).size_bytes
    # A plan is followed to the end, whatever time that takes.
    deadline = NO_DEADLINE if plan is not None else deadline_of(size_bytes, config)
    samples, judges = None, None
    if calibration is not None:
        samples = judges = _open(path, calibration, sizes=config.fix_shape)
    if evaluation is not None:
        judges = _open(path, evaluation, sizes=config.fix_shape)
    timings = TimingCache(costs)
    if plan is not None:
        model = prepare_as_planned(path, plan, samples)
        check_plan(model, plan, samples)
        measured_plan, measured = plan, samples is not None
    else:
        found = prepare_optimized(path, config, samples, timings, deadline)
        model = found.model
        measured = samples is not None and has_time_to_calibrate(config, deadline)
        measured_plan = first_plan(model, config, measured=measured, rewrites=found.applied)
    stats = None
    if samples is not None and measured:
        progress(f"calibrating on {len(samples)} samples")
        until = deadline.of_stage(POLICY.stage_share)
        stats = observe(model, measured_plan, until.limit(samples))
    job = QuantJob(
        model,
        Path(path),
        size_bytes,
        measured_plan,
        stats,
        samples,
        judges,
        contract,
        timings,
        lambda doing: progress(f"{doing}{_time_left(job)}"),
        whole_front,
        deadline,
    )
    with code_allowed(allow_code):
        made = quantize_by_search(job) if plan is None else quantize_by_plan(job)
    return write_result(made, output, made.sensitivities())


def optimize_model(
    path: str | Path,
    output: str | Path,
    samples: SampleSource | SampleSpec | None = None,
    *,
    costs: str | Path | None = None,
    fix_shape: Mapping[str, int] | None = None,
) -> OptimizeResult:
    """The float model with less work for onnxruntime, written to `output` at once or not at all.

    samples    rewrites are checked and timed on the first of these; None for random ones. If the
               model does not run on random ones, only what is exact by construction is rewritten
    fix_shape  name of an open size of the inputs, or INPUT:AXIS -> the size that it always has
    costs      file of the timing cache, read and added to: with all in it, the same bytes again

    Raises: QuantError.
    """
    output = check_output(path, output)
    timings, config = TimingCache(costs), QuantConfig(fix_shape=fix_shape or {})
    try:
        feeds = _open(path, SampleSpec() if samples is None else samples, sizes=config.fix_shape)
        found = prepare_optimized(path, config, feeds, timings, stays_float=True)
    except (DataError, ModelError):
        if samples is not None:
            raise
        found = prepare_optimized(path, config, None, timings, stays_float=True)
    if found.applied:
        found.model.metadata_props[REWRITES] = to_text(found.applied)
    sign(found.model)
    size_bytes = write_model(found.model, output)
    return OptimizeResult(
        output=str(output),
        size_bytes=size_bytes,
        float_size_bytes=model_info(path).size_bytes,
        rewrites=[change.to_dict() for change in found.applied],
        undone=[asdict(attempt) for attempt in found.undone],
    )


@QUIET
def validate_model(
    original: str | Path,
    quantized: str | Path,
    samples: SampleSource | SampleSpec = RANDOM,
    *,
    metric: str | None = None,
    contract: Contract | None = None,
    detailed: bool = False,
    allow_code: str | Path | None = None,
    provider: str = "cpu",
    progress: Progress = silent,
) -> Validation:
    """How near a quantized model comes to its float original, whoever made it.

    samples     with labels as a `SampleSpec`
    metric      "module:function", the user's own, which is measured beside the others
    detailed    whether the sensitivity of each node is measured too
    allow_code  the folder from which a metric "module:function" is imported; None: none runs
    provider    execution provider of onnxruntime that runs both models, such as cuda; the CPU where
                that one does not work, and the note of the fidelity says so
    progress    is called with what is being done, about once a second

    Raises: QuantError.
    """
    own = own_metric(metric, contract.metric if contract is not None else None)
    used, provider_note = find_provider(provider)
    first = open_session(Path(original), provider=used)
    second = open_session(Path(quantized), provider=used)
    feeds = _open(original, samples, first, second)
    check_same_interface(first, second, quantized)
    names = [output.name for output in first.get_outputs()]

    def fidelity_by(metric: str | None) -> Fidelity:
        expected, found = run_each(first, feeds), run_each(second, feeds)
        with code_allowed(allow_code):
            counted = _counted(found, len(feeds), progress)
            return compare(expected, counted, names, feeds.labels, metric)

    try:
        fidelity = fidelity_by(own)
        verdict, reason = Verdict.NONE, "no contract"
        if contract is not None:
            verdict, reason = judge(fidelity, contract)
    except DataError as failure:
        if own is None or contract is None:
            raise
        fidelity = fidelity_by(None)
        verdict, reason = Verdict.NOT_MET, str(failure)
    fidelity = replace(fidelity, note=joined([fidelity.note, provider_note]))
    sensitivities = []
    made = files.load(quantized)
    if detailed:
        progress("measuring what each node costs")
        few = feeds.subsample(POLICY.sensitivity_samples)
        rewrites = from_text(made.metadata_props.get(REWRITES, ""))
        sizes = sizes_of(input_specs(first, second))
        stays_float = STAYS_FLOAT in made.metadata_props
        prepared = prepare(original, prepare_samples(feeds), sizes=sizes, stays_float=stays_float)
        prepared = follow(prepared, rewrites)
        sensitivities = measure_sensitivity(prepared, made, few)
    normalize(made)
    return Validation(
        fidelity,
        verdict,
        reason,
        [asdict(node) for node in saturating_nodes(made)],
        [asdict(sensitivity) for sensitivity in sensitivities],
    )


def benchmark_model(
    original: str | Path,
    quantized: str | Path,
    samples: SampleSource | SampleSpec = RANDOM,
    *,
    threads: int = 1,
    batch: int = 1,
    seconds: float = 3.0,
) -> Timing:
    """How fast a quantized model is beside its original: both run in turns on the same feed.

    threads  of each model
    batch    so many samples are one feed
    seconds  for both together

    Raises: QuantError.
    """
    first = open_session(Path(original), threads=threads)
    second = open_session(Path(quantized), threads=threads)
    feeds = _open(original, replace(_spec(samples), labels=None, count=batch), first, second)
    check_same_interface(first, second, quantized)
    return measure(first, second, feeds.batch(batch), seconds=seconds)


@QUIET
def explain_model(
    path: str | Path,
    config: QuantConfig | None = None,
    samples: SampleSource | SampleSpec = RANDOM,
    *,
    threads: int = 1,
    seconds: float = 1.0,
) -> Explanation:
    """Which kernels run a model on this CPU, whoever made it, and what a plan would change.

    config   of that plan; a model that is quantized already has none
    seconds  how long kernels are timed

    Raises: QuantError.
    """
    sizes = config.fix_shape if config is not None else None
    feeds, model = _open(path, samples, sizes=sizes), load_normalized(path)
    kernels = profile_kernels(
        Path(path), feeds[0], threads=threads, seconds=seconds, normalized=model
    )
    unsafe = {node.node: node.pairs for node in saturating_nodes(model)}
    planned: dict[str, NodePlan] = {}
    is_quantized = graph.is_quantized(model)
    if not is_quantized:
        plan = plan_model(path, config, feeds)
        planned = {node.node: node for node in plan.nodes}
    rows = []
    for kernel in kernels:
        advice = [_advice(planned[name]) for name in kernel.covers if name in planned]
        pairs = sum(unsafe.get(name, 0) for name in kernel.covers)
        rows.append(ExplainedKernel(kernel, pairs, next(filter(None, advice), "")))
    return Explanation(str(path), is_quantized, tuple(rows))


def _advice(planned: NodePlan) -> str:
    """What a plan does with a node that has a weight; "" for the others."""
    if planned.storage is None:
        return ""
    compute = "compute in float" if not planned.compute.is_integer else f"be {planned.compute}"
    reason = f" ({planned.reason})" if planned.reason else ""
    return f"{compute}, weight in {planned.storage}{reason}"


@QUIET
def compare_models(
    original: str | Path,
    others: Sequence[str | Path],
    samples: SampleSource | SampleSpec = RANDOM,
    *,
    metric: str | None = None,
    threads: int = 1,
    seconds: float = 3.0,
    allow_code: str | Path | None = None,
    progress: Progress = silent,
) -> list[Compared]:
    """Several files of one model side by side, whoever made them, against one float reference.

    seconds  for the timing of all together, in turns

    The other parameters are those of `validate_model`. Raises: QuantError.
    """
    own = own_metric(metric, None)
    reference = open_session(Path(original), threads=threads)
    sessions = [open_session(Path(other), threads=threads) for other in others]
    feeds = _open(original, samples, reference, *sessions)
    for session, other in zip(sessions, others, strict=True):
        check_same_interface(reference, session, other)
    names = [output.name for output in reference.get_outputs()]
    progress("running the original")
    expected = StoredOutputs(_counted(run_each(reference, feeds), len(feeds), progress))
    progress(f"timing the original and {len(sessions)} files in turn", seconds)
    timings = measure_all(reference, sessions, feeds[0], seconds=seconds)
    rows = []
    for other, session, timing in zip(others, sessions, timings, strict=True):
        progress(f"comparing {Path(other).name} with the original")
        found = _counted(run_each(session, feeds), len(feeds), progress)
        with code_allowed(allow_code):
            fidelity = compare(expected, found, names, feeds.labels, own)
        rows.append(Compared(str(other), model_info(other).size_bytes, fidelity, timing))
    return rows


def _time_left(job: QuantJob) -> str:
    """How long that job may still take; "" once its time is over, and if it takes what it needs."""
    seconds = job.deadline.seconds_left
    return f" (at most {seconds:.0f} s are left)" if 0 < seconds < math.inf else ""


def _counted(outputs: Iterable[Outputs], total: int, progress: Progress) -> Iterator[Outputs]:
    """The same outputs; about once a second `progress` says how long the others take."""
    start = last = time.monotonic()
    for done, output in enumerate(outputs, 1):
        now = time.monotonic()
        if now - last >= 1.0:
            last, left = now, (now - start) / done * (total - done)
            progress(f"{done} of {total} samples are done", left)
        yield output


def _spec(samples: SampleSource | SampleSpec) -> SampleSpec:
    return samples if isinstance(samples, SampleSpec) else SampleSpec(samples)


def _open(
    model: str | Path,
    samples: SampleSource | SampleSpec,
    *sessions: ort.InferenceSession,
    sizes: Mapping[str, int] | None = None,
) -> Samples:
    """Those samples, for the model in that file; open samples stay as they are.

    sessions  of the model, from callers that have one, and of others made of it, which may fix
              sizes
    sizes     of the inputs that are fixed
    """
    if isinstance(samples, Samples):
        return samples
    first, *others = sessions or (Path(model),)
    specs = fixed_specs(input_specs(first, *others), sizes or {})
    return open_samples(_spec(samples), specs, Path(model))

"""What Python callers use to make models: quantized, or only rewritten exactly."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import ContextDecorator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from quant_core.answers import OptimizeResult
from quant_core.config import Contract, QuantConfig
from quant_core.data.for_model import samples_for
from quant_core.data.spec import RANDOM, SampleShape, SampleSource, SampleSpec
from quant_core.deadline import NO_DEADLINE, Deadline, Progress, silent
from quant_core.evaluate.custom_metric import code_allowed
from quant_core.evaluate.timing_cache import TimingCache
from quant_core.model import files
from quant_core.model.info import model_info
from quant_core.model.to_float32 import stores_float16
from quant_core.model.write import copied_bytes, sign, write_copy, write_model
from quant_core.optimize.applied import REWRITES, to_text
from quant_core.plan.types import QuantPlan
from quant_core.rewrite.apply import apply_plan
from quant_core.search.checks import check_output, check_plan
from quant_core.search.first_plan import first_plan, prepare_and_plan
from quant_core.search.job import QuantJob, deadline_of
from quant_core.search.observing import observed, observed_samples
from quant_core.search.pipeline import quantize_by_plan, quantize_by_search
from quant_core.search.policy import POLICY
from quant_core.search.prepared import is_faster, prepare_as_planned, prepare_optimized
from quant_core.search.result import QuantResult, write_result
from quant_core.text import counted

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
    feeds = None if samples is None else samples_for(path, samples, sizes=config.fix_shape)
    _, plan, _ = prepare_and_plan(path, config, feeds, TimingCache())
    return plan


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
    progress: Progress = silent,
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
    began_at = time.monotonic()
    is_searched = plan is None
    config = plan.config if plan is not None else config or QuantConfig()
    output = check_output(path, output)
    size_bytes = model_info(path).size_bytes
    spent_s = POLICY.start_s + time.monotonic() - began_at
    # A plan is followed to the end, whatever time that takes.
    deadline = deadline_of(size_bytes, config, spent_s) if is_searched else NO_DEADLINE
    samples = judges = None
    if calibration is not None:
        samples = judges = samples_for(path, calibration, sizes=config.fix_shape)
    if evaluation is not None:
        judges = samples_for(path, evaluation, sizes=config.fix_shape)
    timings = TimingCache(costs)
    if plan is None:
        is_free = contract is None and not whole_front
        model, plan, measured = prepare_and_plan(
            path, config, samples, timings, deadline, is_free=is_free
        )
    else:
        model, measured = prepare_as_planned(path, plan, samples), samples is not None
        check_plan(model, plan, samples)
    job = QuantJob(
        model=model,
        original=Path(path),
        float_size_bytes=size_bytes,
        plan=plan,
        samples=samples,
        evaluation=judges,
        contract=contract,
        costs=timings,
        progress=lambda doing, _=None: progress(f"{doing}{_time_left(deadline)}"),
        whole_front=whole_front,
        deadline=deadline,
    )
    if samples is not None and measured:
        count = len(observed_samples(plan, samples))
        progress(f"calibrating on {counted(count, 'sample')}")
        job = observed(job)
    with code_allowed(allow_code):
        made = quantize_by_search(job) if is_searched else quantize_by_plan(job)
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

    What would be larger than its original is written only where it is faster, has fixed shapes, or
    a copy is no smaller, as tensors share bytes of a file; else the original is copied.

    Raises: QuantError.
    """
    output = check_output(path, output)
    timings = TimingCache(costs)
    config = QuantConfig(fix_shape=fix_shape or {})
    feeds = None if samples is None else samples_for(path, samples, sizes=config.fix_shape)
    found = prepare_optimized(path, config, feeds, timings, stays_float=True)
    model = found.model
    if stores_float16(model):
        in_float = replace(config, exclude=("*",))
        model = apply_plan(model, first_plan(model, in_float, measured=False), None).model
    if found.applied:
        model.metadata_props[REWRITES] = to_text(found.applied)
    sign(model)
    size_bytes = write_model(model, output)
    float_size_bytes = files.bytes_on_disk(Path(path))
    rewrites, note = found.applied, ""
    if size_bytes > float_size_bytes:
        note = f"{size_bytes - float_size_bytes} bytes larger than its original"
        growth = size_bytes / float_size_bytes
        may_copy = not fix_shape and copied_bytes(Path(path)) < size_bytes
        if may_copy and not is_faster(path, model, config, feeds, timings, growth=growth):
            note = f"a copy of its original: rewritten, it is {note} and no faster"
            size_bytes, rewrites = write_copy(Path(path), output), ()
    return OptimizeResult(
        output=str(output),
        size_bytes=size_bytes,
        float_size_bytes=float_size_bytes,
        rewrites=[change.to_dict() for change in rewrites],
        undone=[asdict(attempt) for attempt in found.undone],
        note=note,
    )


def _time_left(deadline: Deadline) -> str:
    """How long work may still take; "" once its time is over, and if it takes what it needs."""
    seconds = deadline.seconds_left
    return f" (at most {seconds:.0f} s are left)" if 0 < seconds < math.inf else ""

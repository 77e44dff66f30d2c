"""The stages of a worker: each takes JSON values and paths, and returns JSON values.

`python -m quant_core.worker.stages` serves them (child_main.py). Samples are given as
`SampleSpec.to_dict` writes them, shards as (k, n): the k-th of n.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from quant_core import judging
from quant_core.calibrate.observe import load_parts, save_parts
from quant_core.config import Contract, QuantConfig
from quant_core.data.for_model import samples_for
from quant_core.data.samples import Samples
from quant_core.data.spec import RANDOM, SampleSpec
from quant_core.deadline import NO_DEADLINE
from quant_core.errors import DataError, ModelError
from quant_core.evaluate.node_noise import measure_noise
from quant_core.evaluate.sensitivity import NodeNoise, sensitivities
from quant_core.evaluate.timing_cache import TimingCache
from quant_core.model import files
from quant_core.model.info import model_info
from quant_core.model.locations import disk_bytes
from quant_core.model.normalize import load_normalized
from quant_core.model.session import open_session, run
from quant_core.model.share import share_weights
from quant_core.model.write import write_model
from quant_core.plan.types import QuantPlan
from quant_core.search.checks import check_output
from quant_core.search.first_plan import prepare_and_plan
from quant_core.search.job import QuantJob, deadline_of
from quant_core.search.judges import stand_ins
from quant_core.search.observing import observe_shard, with_statistics
from quant_core.search.pipeline import quantize_by_search
from quant_core.search.policy import POLICY
from quant_core.search.result import write_result
from quant_core.worker.child_main import serve
from quant_core.worker.memory import peak_bytes, reset_peak

Row = dict[str, Any]


def prepare(
    model: str,
    folder: str,
    config: Row,
    samples: Row | None,
    costs: str | None = None,
    contract: Row | None = None,
) -> Row:
    """Write prepared.onnx and plan.json into `folder`; return the plan and the model's facts.

    The answer says too whether there are samples to measure ranges on, and time: random ones may
    fit none.

    costs  file of timings, read and added to
    """
    quant_config = QuantConfig.from_dict(config)
    info = model_info(model)
    deadline = deadline_of(info.size_bytes, quant_config)
    feeds = _open_if_any(model, samples, quant_config.fix_shape)
    costs_known = TimingCache(costs)
    prepared, plan, measured = prepare_and_plan(
        model, quant_config, feeds, costs_known, deadline, is_free=contract is None
    )
    path = Path(folder, "prepared.onnx")
    write_model(prepared, path)
    Path(folder, "plan.json").write_text(plan.to_json(), encoding="utf-8")
    return {
        "info": info.to_dict(),
        "prepared": str(path),
        "plan": plan.to_dict(),
        "measured": measured,
    }


def calibrate(
    prepared: str,
    plan: str,
    samples: Row,
    shard: tuple[int, int],
    out: str,
    spent_s: float = 0.0,
) -> Row:
    """Write the statistics of one shard of the samples to `out`.

    spent_s  of the time budget by the stages before this one
    """
    made_plan = _plan(plan)
    size_bytes = disk_bytes(Path(prepared))
    deadline = deadline_of(size_bytes, made_plan.config, spent_s).of_stage(POLICY.stage_share)
    feeds = _open(prepared, samples)
    parts = observe_shard(load_normalized(prepared), made_plan, feeds, shard, deadline)
    save_parts(out, parts)
    return {"samples": sum(part.samples for part in parts)}


def quantize(
    model: str,
    prepared: str,
    plan: str,
    stats: list[str],
    samples: Row | None,
    contract: Row | None,
    evaluation: Row | None,
    output: str,
    costs: str | None = None,
    spent_s: float = 0.0,
) -> Row:
    """Write the best model to `output`.

    samples     for calibration
    evaluation  samples that candidates are judged by; without them, those for calibration
    costs       file of timings, read and added to
    spent_s     of the time budget by the stages before this one
    """
    made_plan = _plan(plan)
    size_bytes = files.bytes_on_disk(Path(model))
    deadline = deadline_of(size_bytes, made_plan.config, spent_s)
    sizes = made_plan.config.fix_shape
    feeds = _open_if_any(model, samples, sizes)
    checked_output = check_output(model, output)
    job = QuantJob(
        model=load_normalized(prepared),
        original=Path(model),
        float_size_bytes=size_bytes,
        plan=made_plan,
        samples=feeds,
        evaluation=_open(model, evaluation, sizes) if evaluation else feeds,
        contract=Contract.from_dict(contract) if contract else None,
        costs=TimingCache(costs),
        deadline=deadline,
    )
    if stats:
        job = with_statistics(job, [load_parts(path) for path in stats])
    return write_result(quantize_by_search(job), checked_output).to_dict()


def validate(
    model: str,
    quantized: str,
    samples: Row,
    contract: Row | None,
    prepared: str | None = None,
    plan: str | None = None,
    spent_s: float = 0.0,
    are_stand_ins: bool = False,
    costs: str | None = None,
) -> Row:
    """How near the quantized model is to its original.

    prepared       the prepared model: with it, the answer has the quantization noise of each node
    plan           whose time budget that noise is measured in
    spent_s        of that budget by the stages before this one
    are_stand_ins  whether the samples are not given to judge by: without a contract and labels a
                   few of them are compared
    costs          file of timings, read and added to

    Otherwise all are, whatever time is left: the verdict is about all of them.
    """
    started = time.perf_counter()
    spec = SampleSpec.from_dict(samples)
    feeds = samples_for(model, spec, Path(model), Path(quantized))
    promise = Contract.from_dict(contract) if contract else None
    judges = feeds
    if are_stand_ins and promise is None and feeds.labels is None:
        judges = stand_ins(Path(model), feeds, TimingCache(costs))
    validation = judging.validate_model(model, quantized, judges, contract=promise)
    answer = validation.to_dict() | {"detailed": prepared is not None}
    if prepared is not None:
        spent_s += time.perf_counter() - started
        rows = sensitivities([_measure_noise(prepared, plan, quantized, feeds, spent_s)])
        answer["sensitivity"] = [asdict(row) for row in rows]
    return answer


def sensitivity(
    prepared: str,
    plan: str,
    quantized: str,
    samples: Row,
    shard: tuple[int, int],
    spent_s: float = 0.0,
) -> Row:
    """The quantization noise of each node on one shard of a few samples.

    spent_s  of the time budget by the stages before this one
    """
    feeds = _open(prepared, samples)
    found = _measure_noise(prepared, plan, quantized, feeds, spent_s, shard)
    return {"noise": [noise.to_dict() for noise in found]}


def benchmark(model: str, quantized: str, samples: Row | None, threads: int, seconds: float) -> Row:
    """The latency of the quantized model beside its original's, on the first of the samples."""
    spec = SampleSpec.from_dict(samples or {})
    timing = judging.benchmark_model(model, quantized, spec, threads=threads, seconds=seconds)
    return {"timing": timing.to_dict()}


def footprint(model: str, samples: Row, threads: int, batch: int) -> Row:
    """How long the model takes to load, and the memory that loading and running it takes.

    The answer is true only of a fresh child: memory that an earlier stage gave back is used again.
    """
    feed = _open(model, samples).batch(batch)
    reset_peak(os.getpid())
    before = peak_bytes(os.getpid())
    started = time.perf_counter()
    session = open_session(Path(model), threads=threads)
    load_ms = (time.perf_counter() - started) * 1e3
    run(session, feed)
    return {"load_ms": load_ms, "memory_bytes": peak_bytes(os.getpid()) - before}


def share(models: list[str], folder: str, data: str) -> Row:
    """Write graphs of one model with the weights that several hold in one file, named `data`."""
    return {"bytes": share_weights([*map(Path, models)], Path(folder), data)}


STAGES: dict[str, Callable[..., Row]] = {
    "prepare": prepare,
    "calibrate": calibrate,
    "quantize": quantize,
    "validate": validate,
    "sensitivity": sensitivity,
    "benchmark": benchmark,
    "share": share,
    "footprint": footprint,
}


def _open_if_any(model: str, samples: Row | None, sizes: Mapping[str, int]) -> Samples | None:
    """The samples of a request; None without any, or if none fits that could be drawn."""
    if samples is None:
        return None
    try:
        return _open(model, samples, sizes)
    except DataError:
        if samples["source"] != RANDOM:
            raise
        return None


def _open(model: str, samples: Row, sizes: Mapping[str, int] | None = None) -> Samples:
    """The samples of a request, for the model in that file with these sizes fixed."""
    return samples_for(model, SampleSpec.from_dict(samples), sizes=sizes)


def _measure_noise(
    prepared: str,
    plan: str | None,
    quantized: str,
    samples: Samples,
    spent_s: float,
    shard: tuple[int, int] = (0, 1),
) -> list[NodeNoise]:
    """On a few of the samples, or fewer where the plan's time budget ends; of no node where a part
    of a model does not run by itself: the quantized model is made, this only reports.
    """
    deadline = NO_DEADLINE
    if plan is not None:
        deadline = deadline_of(disk_bytes(Path(prepared)), _plan(plan).config, spent_s)
    few = samples.subsample(POLICY.sensitivity_samples)
    feeds = few.shard(*shard) if shard[0] < len(few) else ()
    try:
        return measure_noise(load_normalized(prepared), files.load(quantized), feeds, deadline)
    except ModelError:
        return []


def _plan(path: str) -> QuantPlan:
    return QuantPlan.from_json(Path(path).read_text(encoding="utf-8"))


if __name__ == "__main__":
    serve(STAGES)

"""The stages of one model as Prefect tasks, each of which hands a request to a worker."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.tasks import exponential_backoff

from quant_core.evaluate.sensitivity import NodeNoise, sensitivities
from quant_core.model.atomic import discard
from quant_core.worker.run import StageAnswer
from tasks.locations import Location
from tasks.workers import Workers, is_transient

JobValues = Mapping[str, Any]  # flows.manifest.jobs.Job.to_dict()

# A stage that was interrupted is tried twice more. Nothing is cached: Prefect hashes arguments, not
# files, and never looks whether the output is still there.
ONE_STAGE: dict[str, Any] = {
    "cache_policy": NO_CACHE,
    "persist_result": False,
    "retries": 2,
    "retry_delay_seconds": exponential_backoff(0.5),
    "retry_jitter_factor": 1.0,
    "retry_condition_fn": is_transient,
}


@task(name="prepare", task_run_name="prepare {name}", **ONE_STAGE)
def prepare(
    name: str, workers: Workers, job: JobValues, folder: Location, costs: Location
) -> StageAnswer:
    """Read the model, make it simpler, and plan how each node computes and is stored.

    costs  the file of latencies that were measured before
    """
    request = {
        "model": job["input"],
        "folder": str(folder),
        "config": job["config"],
        "samples": job["calibration"],
        "costs": str(costs),
        "contract": job["contract"],
    }
    return workers.run("prepare", job["input"], request)


@task(name="calibrate", task_run_name="calibrate {name}", **ONE_STAGE)
def calibrate(
    name: str,
    workers: Workers,
    job: JobValues,
    folder: Location,
    outs: Sequence[Location],
    spent_s: float,
) -> StageAnswer:
    """Run the samples, shared out over as many workers as there are files in `outs`.

    spent_s  of the time budget by the stages before this one
    """
    request = {**_prepared(folder), "samples": job["calibration"], "spent_s": spent_s}
    shares = [{**request, "shard": [k, len(outs)], "out": str(out)} for k, out in enumerate(outs)]
    answers = workers.run_all("calibrate", job["input"], shares)
    samples = sum(answer["result"]["samples"] for answer in answers)
    return _together({"stats": [str(out) for out in outs], "samples": samples}, answers)


@task(name="quantize", task_run_name="quantize {name}", **ONE_STAGE)
def quantize(
    name: str,
    workers: Workers,
    job: JobValues,
    folder: Location,
    stats: Sequence[str],
    output: Location,
    costs: Location,
    spent_s: float,
) -> StageAnswer:
    """Rewrite the model by its plan and its statistics, and search for the best one.

    stats    the files that `calibrate` wrote
    costs    the file of latencies that were measured before
    spent_s  of the time budget by the stages before this one

    All files beside `output` are published later. So those of an attempt that was killed go first.
    """
    if isinstance(output, Path):  # in a store every attempt begins in a folder of its own
        discard(output.parent)
        output.parent.mkdir(parents=True)
    request = {
        **_prepared(folder),
        "model": job["input"],
        "stats": list(stats),
        "samples": job["calibration"],
        "contract": job["contract"],
        "evaluation": job["evaluation"],
        "output": str(output),
        "costs": str(costs),
        "spent_s": spent_s,
    }
    return workers.run("quantize", job["input"], request)


@task(name="validate", task_run_name="validate {name}", **ONE_STAGE)
def validate(
    name: str,
    workers: Workers,
    job: JobValues,
    quantized: Location,
    folder: Location | None = None,
    spent_s: float = 0.0,
    costs: Location | None = None,
) -> StageAnswer:
    """Compare the outputs of both models, and judge them by the contract.

    folder   where `prepare` wrote, if the sensitivity of each node is to be measured too
    spent_s  of the time budget by the stages before this one
    costs    the file of latencies that were measured before
    """
    request = {
        "model": job["input"],
        "quantized": str(quantized),
        "samples": job["judged_by"],
        "contract": job["contract"],
        "spent_s": spent_s,
        "are_stand_ins": job["evaluation"] is None,
        "costs": None if costs is None else str(costs),
        **(_prepared(folder) if folder is not None else {}),
    }
    return workers.run("validate", job["input"], request)


@task(name="sensitivity", task_run_name="sensitivity {name}", **ONE_STAGE)
def sensitivity(
    name: str,
    workers: Workers,
    job: JobValues,
    folder: Location,
    quantized: Location,
    shards: int,
    spent_s: float,
) -> StageAnswer:
    """Measure the sensitivity of each node, with the samples shared out over `shards` workers.

    spent_s  of the time budget by the stages before this one
    """
    request = {
        **_prepared(folder),
        "spent_s": spent_s,
        "quantized": str(quantized),
        "samples": job["judged_by"],
    }
    shares = [{**request, "shard": [k, shards]} for k in range(shards)]
    answers = workers.run_all("sensitivity", job["input"], shares)
    parts = [[NodeNoise(**row) for row in answer["result"]["noise"]] for answer in answers]
    return _together({"sensitivity": [asdict(row) for row in sensitivities(parts)]}, answers)


@task(name="benchmark", task_run_name="benchmark {name}", **ONE_STAGE)
def benchmark(
    name: str,
    workers: Workers,
    job: JobValues,
    quantized: Location,
    threads: int,
    seconds: float,
    on_wait: Callable[[float], None],
) -> StageAnswer:
    """Time the two models in turns, while no other stage runs on the host.

    on_wait  called once if it has to wait for that, with the seconds that it may wait at most
    """
    request = {
        "model": job["input"],
        "quantized": str(quantized),
        "samples": job["judged_by"],
        "threads": threads,
        "seconds": seconds,
    }
    return workers.run_alone("benchmark", job["input"], request, on_wait)


@task(name="share", task_run_name="share {name}", **ONE_STAGE)
def share(
    name: str, workers: Workers, job: JobValues, models: Sequence[Path], folder: Path
) -> StageAnswer:
    """Write the graphs of a model into a folder, with the weights that several hold in one file."""
    request = {
        "models": [str(path) for path in models],
        "folder": str(folder),
        "data": job["data"],
    }
    return workers.run("share", job["input"], request)


def _together(result: dict[str, Any], answers: Sequence[StageAnswer]) -> StageAnswer:
    """The answer of a stage that several workers shared."""
    return {
        "result": result,
        "seconds": max(answer["seconds"] for answer in answers),
        "peak_bytes": max(answer["peak_bytes"] for answer in answers),
        "files": {name: file for a in answers for name, file in a.get("files", {}).items()},
    }


def _prepared(folder: Location) -> dict[str, str]:
    """The files that `prepare` wrote into a model's folder."""
    return {"prepared": str(folder / "prepared.onnx"), "plan": str(folder / "plan.json")}

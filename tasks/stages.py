"""The stages of one model as Prefect tasks: each hands a request to a worker and returns what `run_stage` answered."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.tasks import exponential_backoff

from quant_core.evaluate.sensitivity import NodeNoise, sensitivities
from tasks.workers import Workers, is_transient

Job = Mapping[str, Any]  # a job of the manifest, as JSON
Run = dict[str, Any]

# Twice more for what can pass. Nothing is cached: Prefect hashes arguments, not files, and never looks for the output.
ONE_STAGE: dict[str, Any] = {
    "cache_policy": NO_CACHE,
    "persist_result": False,
    "retries": 2,
    "retry_delay_seconds": exponential_backoff(0.5),
    "retry_jitter_factor": 1.0,
    "retry_condition_fn": is_transient,
}


@task(name="prepare", task_run_name="prepare {name}", **ONE_STAGE)
def prepare(name: str, workers: Workers, job: Job, folder: Path) -> Run:
    """Read the model, fold what is constant, and decide what becomes of each node."""
    request = {
        "model": job["input"],
        "folder": str(folder),
        "config": job["config"],
        "samples": job["calibration"],
    }
    return workers.run("prepare", job["input"], request)


@task(name="calibrate", task_run_name="calibrate {name}", **ONE_STAGE)
def calibrate(name: str, workers: Workers, job: Job, folder: Path, outs: Sequence[Path]) -> Run:
    """Run the samples, one share of them for each file of statistics in `outs`."""
    request = {**_prepared(folder), "samples": job["calibration"]}
    shares = [{**request, "shard": [k, len(outs)], "out": str(out)} for k, out in enumerate(outs)]
    runs = workers.run_all("calibrate", job["input"], shares)
    samples = sum(run["result"]["samples"] for run in runs)
    return _together({"stats": [str(out) for out in outs], "samples": samples}, runs)


@task(name="quantize", task_run_name="quantize {name}", **ONE_STAGE)
def quantize(
    name: str,
    workers: Workers,
    job: Job,
    folder: Path,
    stats: Sequence[str],
    output: Path,
    costs: Path,
) -> Run:
    """Rewrite the model by its plan and its statistics, until its contract is met or nothing is left to try.

    All that lies beside `output` is published: a try that was killed leaves nothing of its own there.
    """
    shutil.rmtree(output.parent, ignore_errors=True)
    output.parent.mkdir(parents=True)
    request = {
        **_prepared(folder),
        "model": job["input"],
        "stats": list(stats),
        "samples": job["calibration"],
        "config": job["config"],
        "contract": job["contract"],
        "evaluation": job["evaluation"],
        "output": str(output),
        "costs": str(costs),
    }
    return workers.run("quantize", job["input"], request)


@task(name="validate", task_run_name="validate {name}", **ONE_STAGE)
def validate(
    name: str, workers: Workers, job: Job, quantized: Path, prepared: Path | None = None
) -> Run:
    """Compare what both models answer, and hold that against the contract; tell what nodes cost if given `prepared`."""
    contract = job["contract"]
    request = {
        "model": job["input"],
        "quantized": str(quantized),
        "samples": job["judged_by"],
        "contract": contract,
        "metric": contract["metric"] if contract else None,
        "prepared": str(prepared) if prepared is not None else None,
    }
    return workers.run("validate", job["input"], request)


@task(name="sensitivity", task_run_name="sensitivity {name}", **ONE_STAGE)
def sensitivity(
    name: str, workers: Workers, job: Job, folder: Path, quantized: Path, shards: int
) -> Run:
    """What each node costs, where workers are idle enough to share the samples: `shards` ways."""
    request = {
        "prepared": str(folder / "prepared.onnx"),
        "quantized": str(quantized),
        "samples": job["judged_by"],
    }
    runs = workers.run_all(
        "sensitivity", job["input"], [{**request, "shard": [k, shards]} for k in range(shards)]
    )
    parts = [[NodeNoise(**noise) for noise in run["result"]["noise"]] for run in runs]
    return _together({"damage": [asdict(row) for row in sensitivities(parts)]}, runs)


@task(name="benchmark", task_run_name="benchmark {name}", **ONE_STAGE)
def benchmark(
    name: str, workers: Workers, job: Job, quantized: Path, threads: int, seconds: float
) -> Run:
    """Time the two models against each other, with the host to themselves."""
    request = {
        "model": job["input"],
        "quantized": str(quantized),
        "samples": job["judged_by"],
        "threads": threads,
        "seconds": seconds,
    }
    return workers.run("benchmark", job["input"], request, alone=True)


def _together(result: dict[str, Any], runs: Sequence[Run]) -> Run:
    """One answer of several shares."""
    return {
        "result": result,
        **{key: max(run[key] for run in runs) for key in ("seconds", "peak_bytes")},
    }


def _prepared(folder: Path) -> dict[str, str]:
    """What `prepare` leaves in a model's folder."""
    return {"prepared": str(folder / "prepared.onnx"), "plan": str(folder / "plan.json")}

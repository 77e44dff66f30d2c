"""The report rows of a run and of each model: from what was requested and what stages answered."""

from __future__ import annotations

import json
import platform
import shlex
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.batch.failure import Failure
from flows.console.result import BatchResult
from flows.entries import ModelEntry, RunEntry, now_after
from flows.manifest.jobs import Job
from quant_core.config import Contract
from quant_core.evaluate.contract import Verdict, conclude, gain_clauses
from quant_core.metrics import Fidelity, default_metric, find_metric
from quant_core.plan.targets import cpu_name, host_target_name
from quant_core.text import joined, plain, printable
from quant_core.versions import versions
from tasks.rows import SCHEMA_VERSION, LayerRow, ModelRow, Outcome, RunRow, TimingRow

if TYPE_CHECKING:
    from flows.batch.model_run import ModelRun
    from quant_core.worker.run import StageAnswer

Columns = dict[str, Any]

QUANTIZE_COLUMNS = (
    "target",
    "saturation_safe",
    "size_bytes",
    "float_size_bytes",
    "floor_db",
    "worst_db",
    "lower_db",
    "note",
    "chosen",
)
BENCHMARK_COLUMNS = ("float_ms", "quantized_ms", "speedup")


def model_entry(model: ModelRun, run_id: str) -> ModelEntry:
    """The entry of a model whose stages ran, as far as they got.

    Raises: TypeError if an answer of a stage fits no column.
    """
    return ModelEntry(
        run_id=run_id,
        name=model.job.name,
        digest=model.digest,
        row=_model_row(model, run_id),
        files=model.files,
        job=model.job.to_dict(),
        versions=versions(),
        layers=_layer_rows(model, run_id),
        timings=_timing_rows(model, run_id),
    )


def failed_entry(job: Job, digest: str, run_id: str, failure: Failure) -> ModelEntry:
    """The entry of a model that failed before a stage could run."""
    now = datetime.now(UTC)
    row = ModelRow(**_requested(job, digest, run_id, now))
    return ModelEntry(run_id, job.name, digest, _failed(row, failure))


def skipped_entry(job: Job, run_id: str, made: ModelEntry) -> ModelEntry:
    """The entry of a model that `made`, of an earlier run, finished; the numbers are that run's."""
    now = datetime.now(UTC)
    row = replace(
        made.row,
        run_id=run_id,
        model=job.name,
        outcome=Outcome.SKIPPED,
        started_at=now,
        finished_at=now,
    )
    return replace(
        made, run_id=run_id, name=job.name, row=row, job=job.to_dict(), layers=(), timings=()
    )


def run_row(
    run: RunEntry, result: BatchResult, finished_at: datetime, workers: int, folder: Path
) -> RunRow:
    """The row of a run that is finished.

    folder  of the journal
    """
    started_at, counts, made_with = run.started_at, result.counts, versions()
    return RunRow(
        run_id=run.run_id,
        started_at=started_at,
        finished_at=finished_at,
        seconds=result.seconds,
        models=len(result.rows),
        done=counts["done"],
        skipped=counts["skipped"],
        failed=counts["failed"],
        not_met=counts["not_met"],
        folder=str(folder),
        workers=workers,
        host=platform.node(),
        target=host_target_name(),
        python=platform.python_version(),
        quantmill=made_with["quantmill"],
        onnx=made_with["onnx"],
        onnxruntime=made_with["onnxruntime"],
        cpu=cpu_name(),
        command=printable(shlex.join(sys.orig_argv)),
        schema_version=SCHEMA_VERSION,
    )


def accuracy_of(job: Job, fidelity: Mapping[str, Any]) -> Columns:
    """The columns of accuracy. `accuracy` is in the contract's metric, or in the default one."""
    measured = Fidelity.from_dict(fidelity)
    metric = find_metric(job.contract.metric) if job.contract else default_metric(measured)
    return {
        "agreement": measured.agreement,
        "cosine": measured.cosine,
        "sqnr_db": measured.sqnr_db,
        "max_abs_error": measured.max_abs_error,
        "metric": metric.name,
        "accuracy": metric.value(measured),
        "accuracy_float": metric.of_float(measured) if metric.of_float is not None else None,
    }


def _model_row(model: ModelRun, run_id: str) -> ModelRow:
    """The row of a model. Speed and size are judged here: `validate` knows neither."""
    job, answers = model.job, model.answers
    columns = _requested(job, model.digest, run_id, model.started_at)
    columns["seconds"] = sum(answer["seconds"] for answer in answers.values())
    columns["peak_bytes"] = max((answer["peak_bytes"] for answer in answers.values()), default=None)
    if "quantize" in answers:
        columns |= _of_quantize(answers["quantize"])
        columns["note"] = joined([model.note, columns["note"]]) or None
    if "validate" in answers:
        columns |= _of_validate(job, answers["validate"])
    if "benchmark" in answers:
        columns |= _of_benchmark(answers["benchmark"])
    if job.contract and columns["verdict"] is Verdict.MET:
        columns |= _of_speed_and_size(job.contract, columns)
    if "quantize" in answers and (shortfall := answers["quantize"]["result"]["shortfall"]):
        columns |= {"verdict": Verdict.NOT_MET, "reason": shortfall}
    row = ModelRow(**columns)
    return row if model.failure is None else _failed(row, model.failure)


def _requested(job: Job, digest: str, run_id: str, started_at: datetime) -> Columns:
    """The columns of a model of which nothing is known but what was requested."""
    config = job.config.to_dict()
    return {
        "run_id": run_id,
        "model": job.name,
        "digest": digest,
        "input": str(job.input),
        "output": str(job.output),
        "outcome": Outcome.DONE,
        "verdict": Verdict.NONE,
        **{key: config[key] for key in ("bits", "mode", "method", "target")},
        "metric": job.contract.metric if job.contract else None,
        "config": json.dumps(config),
        "started_at": started_at,
        "finished_at": now_after(started_at),
    }


def _of_quantize(answer: StageAnswer) -> Columns:
    result = plain(answer["result"])
    columns = {key: result[key] for key in QUANTIZE_COLUMNS}
    columns["size_ratio"] = result["size_bytes"] / result["float_size_bytes"]
    columns["trace"] = json.dumps(result["trace"])
    return columns


def _of_validate(job: Job, answer: StageAnswer) -> Columns:
    result = plain(answer["result"])
    judged = {"verdict": Verdict(result["verdict"]), "reason": result["reason"]}
    return judged | accuracy_of(job, result["fidelity"])


def _of_benchmark(answer: StageAnswer) -> Columns:
    timing = plain(answer["result"]["timing"])
    columns = {key: timing[key] for key in BENCHMARK_COLUMNS}
    return columns | {key: answer.get(key) for key in ("host_load", "busy")}


def _of_speed_and_size(contract: Contract, columns: Columns) -> Columns:
    """The verdict and its reason if the contract is missed by speed or size, else nothing."""
    speedup, size_ratio = columns.get("speedup"), columns["size_ratio"]
    ruling = conclude(gain_clauses(contract, speedup=speedup, size_ratio=size_ratio))
    return {} if ruling.verdict is Verdict.MET else asdict(ruling)


def _failed(row: ModelRow, failure: Failure) -> ModelRow:
    """The row of a model with the stage that failed, and without a verdict."""
    return replace(
        row,
        outcome=Outcome.FAILED,
        verdict=Verdict.NONE,
        reason=None,
        note=None,
        **failure.columns(),
    )


def _layer_rows(model: ModelRun, run_id: str) -> tuple[LayerRow, ...]:
    """One row for each planned node, in the order of the plan."""
    if "quantize" not in model.answers:
        return ()
    sensitivity = _sensitivity(model.answers)
    rows = []
    for position, layer in enumerate(model.answers["quantize"]["result"]["layers"]):
        measured = sensitivity.get(layer["node"], {})
        columns = {
            LayerRow.renamed.get(key, key): value for key, value in (layer | measured).items()
        }
        rows.append(LayerRow(**_key(model, run_id), position=position, **plain(columns)))
    return tuple(rows)


def _key(model: ModelRun, run_id: str) -> Columns:
    """The columns that tell which run made which model."""
    return {"run_id": run_id, "model": model.job.name, "digest": model.digest}


def _sensitivity(answers: Mapping[str, StageAnswer]) -> dict[str, Mapping[str, Any]]:
    """Node -> how much its quantization costs, as the stage that measured it answered."""
    measured = answers.get("sensitivity") or answers.get("validate")
    rows = measured["result"]["sensitivity"] if measured else []
    return {row["node"]: row for row in rows}


def _timing_rows(model: ModelRun, run_id: str) -> tuple[TimingRow, ...]:
    """One row for each stage, in the order in which they ran."""
    rows = []
    for stage, answer in model.answers.items():
        latencies = plain(answer["result"]["timing"]) if stage == "benchmark" else {}
        deciles = {
            key: json.dumps(values)
            for key, values in latencies.items()
            if key.endswith("_deciles_ms")
        }
        rows.append(
            TimingRow(
                **_key(model, run_id),
                stage=stage,
                started_at=datetime.fromisoformat(answer["started_at"]),
                seconds=answer["seconds"],
                peak_bytes=answer["peak_bytes"],
                host_load=answer.get("host_load"),
                busy=answer.get("busy"),
                **(latencies | deciles),
            )
        )
    return tuple(rows)

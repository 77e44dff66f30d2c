"""The evidence as Parquet: one typed table each for runs, models, layers, timings and audits, one file per run."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from prefect import task
from prefect.cache_policies import NO_CACHE

TEXT, WHOLE, REAL, YES = pa.string(), pa.int64(), pa.float64(), pa.bool_()
TIME = pa.timestamp("us", tz="UTC")

RUNS = {
    "run_id": TEXT,
    "started_at": TIME,
    "finished_at": TIME,
    "seconds": REAL,
    "models": WHOLE,
    "done": WHOLE,
    "skipped": WHOLE,
    "failed": WHOLE,
    "not_met": WHOLE,
    "folder": TEXT,
    "workers": WHOLE,
    "host": TEXT,
    "target": TEXT,
    "python": TEXT,
    "quantmill": TEXT,
    "onnx": TEXT,
    "onnxruntime": TEXT,
}

# outcome  done, skipped (up to date: the numbers are those of the run that made it), failed
# verdict  met, not_met, none (no contract, or no result)
# busy     others took more than a quarter of a core of the host while it was timed: a speed to doubt
MODELS = {
    "run_id": TEXT,
    "model": TEXT,
    "digest": TEXT,
    "input": TEXT,
    "output": TEXT,
    "outcome": TEXT,
    "verdict": TEXT,
    "reason": TEXT,
    "note": TEXT,
    "stage": TEXT,
    "error": TEXT,
    "where": TEXT,
    "hint": TEXT,
    "bits": WHOLE,
    "mode": TEXT,
    "method": TEXT,
    "target": TEXT,
    "saturation_safe": YES,
    "float_size_bytes": WHOLE,
    "size_bytes": WHOLE,
    "size_ratio": REAL,
    "metric": TEXT,
    "accuracy_float": REAL,
    "accuracy": REAL,
    "agreement": REAL,
    "cosine": REAL,
    "sqnr_db": REAL,
    "max_abs_error": REAL,
    "float_ms": REAL,
    "quantized_ms": REAL,
    "speedup": REAL,
    "host_load": REAL,
    "busy": YES,
    "seconds": REAL,
    "peak_bytes": WHOLE,
    "started_at": TIME,
    "finished_at": TIME,
    "config": TEXT,
    "trace": TEXT,
}

LAYERS = {
    "run_id": TEXT,
    "model": TEXT,
    "digest": TEXT,
    "position": WHOLE,
    "node": TEXT,
    "op_type": TEXT,
    "compute": TEXT,
    "storage": TEXT,
    "weight": TEXT,
    "scale": REAL,
    "zero_point": WHOLE,
    "sqnr_db": REAL,
    "isolated_db": REAL,
    "cumulative_db": REAL,
    "saturation_safe": YES,
    "elements": WHOLE,
    "reason": TEXT,
}

# One row per stage that ran; latencies only where the stage is benchmark.
TIMINGS = {
    "run_id": TEXT,
    "model": TEXT,
    "digest": TEXT,
    "stage": TEXT,
    "started_at": TIME,
    "seconds": REAL,
    "peak_bytes": WHOLE,
    "float_ms": REAL,
    "quantized_ms": REAL,
    "float_p95_ms": REAL,
    "quantized_p95_ms": REAL,
    "speedup": REAL,
    "speedup_lo": REAL,
    "speedup_hi": REAL,
    "rounds": WHOLE,
    "threads": WHOLE,
    "host_load": REAL,
    "busy": YES,
}

# outcome  kept; regressed (missing, changed, less right, slower); stale (not comparable any more); failed
AUDITS = {
    "run_id": TEXT,
    "model": TEXT,
    "digest": TEXT,
    "output": TEXT,
    "outcome": TEXT,
    "reason": TEXT,
    "stage": TEXT,
    "error": TEXT,
    "where": TEXT,
    "hint": TEXT,
    "metric": TEXT,
    "accuracy_before": REAL,
    "accuracy": REAL,
    "speedup_before": REAL,
    "speedup": REAL,
    "host_load": REAL,
    "busy": YES,
    "made_with": TEXT,
    "host": TEXT,
    "quantmill": TEXT,
    "onnx": TEXT,
    "onnxruntime": TEXT,
    "started_at": TIME,
    "finished_at": TIME,
}

TABLES = {"runs": RUNS, "models": MODELS, "layers": LAYERS, "timings": TIMINGS, "audits": AUDITS}
SCHEMAS = {name: pa.schema(list(columns.items())) for name, columns in TABLES.items()}


@task(name="report", task_run_name="report {run_id}", cache_policy=NO_CACHE, persist_result=False)
def report(
    run_id: str, folder: Path, tables: Mapping[str, Iterable[Mapping[str, Any]]]
) -> list[Path]:
    """Write this run's rows of every table, replacing what an interrupted attempt left."""
    return [write_table(folder, name, run_id, rows) for name, rows in tables.items()]


def write_table(folder: Path, name: str, run_id: str, rows: Iterable[Mapping[str, Any]]) -> Path:
    """`folder/name/run_id.parquet`, there as a whole or not at all: a torn file spoils the data set for readers."""
    path = folder / name / f"{run_id}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    for stray in path.parent.glob(".*.tmp"):
        stray.unlink(missing_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")  # readers pass over names that start with a dot
    with temporary.open("wb") as file:
        pq.write_table(
            pa.Table.from_pylist(list(rows), schema=SCHEMAS[name]), file, compression="zstd"
        )
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    return path

"""Output folders with the reports of made-up batches: any number of models, with any names."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np

from quant_core.config import QuantConfig
from quant_core.evaluate.contract import Verdict
from tasks.report import write_table
from tasks.rows import LayerRow, ModelRow, Outcome, RunRow, TimingRow

# Of layers behind a ReLU, of normal values, of a few outliers, of two heaps.
BINS = np.arange(24)
HISTOGRAM = [
    np.round(1000 * shape / shape.sum()).astype(int).tolist()
    for shape in (
        np.exp(-BINS / 3),
        np.exp(-((BINS - 12) ** 2) / 18),
        np.where(BINS < 3, 1.0, 0.001),
        np.exp(-((BINS - 5) ** 2) / 4) + np.exp(-((BINS - 18) ** 2) / 4),
    )
]
START = datetime(2026, 5, 4, 12, tzinfo=UTC)


def write_reports(
    folder: Path,
    names: Sequence[str],
    *,
    runs: int = 1,
    layers: int = 60,
    failed: Sequence[str] = (),
    not_met: Sequence[str] = (),
    slower: Sequence[str] = (),
) -> Path:
    """`runs` runs of these models, in which the last one has failures and slower models."""
    for i in range(runs):
        run_id, is_last = f"run-{i}", i == runs - 1
        models: list[ModelRow] = []
        for seed, name in enumerate(names):
            rng = np.random.default_rng(seed)  # a model has the same numbers in every run
            if is_last and name in failed:
                models.append(_failed(run_id, name))
            else:
                factor = 0.5 if is_last and name in slower else 1.0
                models.append(_made(run_id, name, rng, factor, name in not_met))
        rng = np.random.default_rng(0)
        made = [row for row in models if row.outcome is Outcome.DONE]
        tables = {
            "layers": [row for model in made for row in _layers(model, layers, rng)],
            "timings": [row for model in made for row in _timings(model)],
            "models": models,
            "runs": [_run(run_id, i, folder, models)],
        }
        for table, rows in tables.items():
            write_table(folder / "reports", table, run_id, rows)
    return folder


def _run(run_id: str, i: int, folder: Path, models: list[ModelRow]) -> RunRow:
    started_at = START + timedelta(days=i)
    failed = sum(row.outcome is Outcome.FAILED for row in models)
    return RunRow(
        run_id=run_id,
        started_at=started_at,
        finished_at=started_at + timedelta(minutes=3),
        seconds=180.0,
        models=len(models),
        done=len(models) - failed,
        skipped=0,
        failed=failed,
        not_met=sum(row.verdict is Verdict.NOT_MET for row in models),
        folder=str(folder),
        workers=2,
        host="bench",
        target="x86-vnni",
        python="3.11.7",
        quantmill="0.1.0",
        onnx="1.20.0",
        onnxruntime="1.30.0",
        cpu="A CPU",
        command="python -m flows.batch manifest.yaml",
    )


def _failed(run_id: str, name: str) -> ModelRow:
    return ModelRow(
        run_id=run_id,
        model=name,
        digest=f"digest of {name}",
        input=f"in/{name}.onnx",
        output=f"out/{name}.onnx",
        outcome=Outcome.FAILED,
        verdict=Verdict.NONE,
        stage="calibrate",
        error="the samples <b>do not fit</b>",
        hint="Give samples of shape 1,3,224,224",
    )


def _made(
    run_id: str, name: str, rng: np.random.Generator, factor: float, is_missed: bool
) -> ModelRow:
    size, speedup = int(rng.integers(2e5, 9e7)), factor * float(rng.uniform(1.9, 2.1))
    trials = ("static", "dynamic", "static, channels equalized", "outliers split off")
    trace = [
        {
            "candidate": label,
            "speedup": float(rng.uniform(1, 3)),
            "sqnr_db": float(rng.uniform(18, 45)),
            "agreement": float(rng.uniform(0.97, 1)),
            "size_bytes": size // 4 + int(rng.integers(1000)),
        }
        for label in trials
    ]
    return ModelRow(
        run_id=run_id,
        model=name,
        digest=f"digest of {name}",
        input=f"in/{name}.onnx",
        output=f"out/{name}.onnx",
        outcome=Outcome.DONE,
        verdict=Verdict.NOT_MET if is_missed else Verdict.MET,
        reason="top1 0.99 to 0.95: drop 0.04, at most 0.01" if is_missed else "as promised",
        target="x86-vnni",
        saturation_safe=False,
        float_size_bytes=size,
        size_bytes=size // 4,
        size_ratio=0.25,
        metric="top1",
        accuracy_float=0.99,
        accuracy=0.95 if is_missed else 0.989,
        agreement=0.995,
        cosine=0.9999,
        sqnr_db=35.0,
        float_ms=float(rng.uniform(0.2, 30)),
        quantized_ms=1.0,
        speedup=speedup,
        busy=False,
        config=json.dumps({**QuantConfig().to_dict(), "exclude": ["*/head/*"]}),
        trace=json.dumps(trace),
        chosen=max(trace, key=lambda trial: trial["speedup"])["candidate"],
    )


def _layers(model: ModelRow, count: int, rng: np.random.Generator) -> list[LayerRow]:
    db = rng.uniform(15, 50, size=(3, count))
    return [
        LayerRow(
            run_id=model.run_id,
            model=model.model,
            digest=model.digest,
            position=i,
            node=f"/{model.model}/stage{i // 8}/block{i % 8}/Conv",
            op_type="Conv",
            compute="static",
            storage="int8",
            sqnr_db=float(db[0, i]),
            isolated_db=float(db[1, i]),
            cumulative_db=float(db[2, i]),
            elements=int(rng.integers(100, 1e6)),
            seen_lo=-1.0,
            seen_hi=float(db[0, i]),
            range_lo=0.0,
            range_hi=float(db[0, i]) * 0.8,
            histogram=json.dumps(HISTOGRAM[i % 4]),
            reason="" if i % 5 else "nobody reads its output in integers",
        )
        for i in range(count)
    ]


def _timings(model: ModelRow) -> list[TimingRow]:
    assert model.speedup is not None
    assert model.float_ms is not None
    ids = {"run_id": model.run_id, "model": model.model, "digest": model.digest}
    return [
        TimingRow(**ids, stage="quantize", seconds=2.5, peak_bytes=200_000_000),
        TimingRow(
            **ids,
            stage="benchmark",
            seconds=3.0,
            float_ms=model.float_ms,
            float_p95_ms=model.float_ms * 1.2,
            quantized_ms=model.float_ms / model.speedup,
            quantized_p95_ms=model.float_ms / model.speedup * 1.3,
            speedup=model.speedup,
            speedup_lo=model.speedup * 0.97,
            speedup_hi=model.speedup * 1.03,
            rounds=41,
            float_deciles_ms=json.dumps([model.float_ms * (1 + i / 20) for i in range(11)]),
            quantized_deciles_ms=json.dumps(
                [model.float_ms / model.speedup * (1 + i / 20) for i in range(11)]
            ),
            threads=1,
        ),
    ]

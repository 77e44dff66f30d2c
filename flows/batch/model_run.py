"""How one model gets made: stage by stage, each answer kept until the model is finished, each failure a row."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flows.batch.digests import versions
from flows.batch.journal import Stages, publish
from flows.console.result import Listener
from flows.manifest.jobs import Benchmark, Job
from quant_core.errors import QuantError
from quant_core.metrics import Fidelity, default_metric, find_metric
from quant_core.text import plain, printable
from tasks import stages as tasks
from tasks.workers import Workers

Run = dict[str, Any]


class Making:
    """One job on its way. `failure` is set once a stage has failed, and nothing more happens then."""

    def __init__(
        self, job: Job, digest: str, stages: Stages, workers: Workers, costs: Path, notify: Listener
    ) -> None:
        self.job, self.digest, self.stages, self.workers, self.notify = (
            job,
            digest,
            stages,
            workers,
            notify,
        )
        self.costs = costs
        self.asked = job.to_dict()
        self.started_at = _now()
        self.answers: dict[str, Run] = {}
        self.files: dict[str, list[Any]] = {}
        self.failure: tuple[str, QuantError] | None = None

    def make(self, shards: int) -> None:
        """Prepare, calibrate, quantize, validate, publish; samples are shared out among so many workers."""
        name, folder = printable(self.job.name), self.stages.folder
        output = folder / "out" / self.job.output.name
        outs = [folder / f"stats-{k}-of-{shards}.npz" for k in range(shards)]
        prepared = (
            folder / "prepared.onnx" if shards == 1 else None
        )  # with more, a stage of its own tells what nodes cost
        steps: dict[str, Callable[[], Run]] = {
            "prepare": lambda: tasks.prepare(name, self.workers, self.asked, folder),
            "calibrate": lambda: tasks.calibrate(name, self.workers, self.asked, folder, outs),
            "quantize": lambda: tasks.quantize(
                name, self.workers, self.asked, folder, self._stats(), output, self.costs
            ),
            "validate": lambda: tasks.validate(name, self.workers, self.asked, output, prepared),
        }
        if self.job.calibration is None:
            del steps["calibrate"]
        for stage, call in steps.items():
            self._step(stage, call)
        if (judged := self._result("validate")) and not judged["detailed"]:
            self._step(
                "sensitivity",
                lambda: tasks.sensitivity(name, self.workers, self.asked, folder, output, shards),
            )
        self._guarded("publish", self._publish)
        self.notify({"event": "made", "model": self.job.name})

    def benchmark(self, how: Benchmark) -> None:
        """Time what was published."""
        job, threads, seconds = self.job, how.threads, how.seconds
        self._step(
            "benchmark",
            lambda: tasks.benchmark(
                printable(job.name), self.workers, self.asked, job.output, threads, seconds
            ),
        )

    def entry(self, run_id: str) -> dict[str, Any]:
        """What the journal keeps of it."""
        row = self._row() | {"run_id": run_id}
        of = {"run_id": run_id, "model": self.job.name, "digest": self.digest}
        layers = (self._result("quantize") or {"layers": []})["layers"]
        judged = self._result("sensitivity") or self._result("validate") or {"damage": []}
        costs = {row["node"]: row for row in judged["damage"]}
        return {
            "event": "model",
            "run_id": run_id,
            "name": self.job.name,
            "digest": self.digest,
            "files": self.files,
            "job": self.asked,
            "versions": versions(),
            "row": row,
            "layers": [
                plain({**of, "position": k, **layer, **costs.get(layer["node"], {})})
                for k, layer in enumerate(layers)
            ],
            "timings": [
                plain({**of, **_timing(stage, run)}) for stage, run in self.answers.items()
            ],
        }

    def _step(self, stage: str, call: Callable[[], Run]) -> None:
        """The stage's answer: what is kept of it, or a new one."""
        if self.failure is not None:
            return
        run = self.stages.answer(stage)
        if run is None:
            self.notify({"event": "stage", "model": self.job.name, "stage": stage})
            started_at = _now()
            run = self._guarded(stage, call)
            if run is None:
                return
            run = {"started_at": started_at, **run}
            self._guarded(stage, lambda: self.stages.keep(stage, run))
        self.answers[stage] = run

    def _guarded(self, stage: str, call: Callable[[], Any]) -> Any:
        if self.failure is not None:
            return None
        try:
            return call()
        except QuantError as problem:
            self.failure = stage, problem
        except OSError as problem:
            reason = (problem.strerror or str(problem)).lower()
            hint = "Is there space, and may you write there?"
            self.failure = stage, QuantError(reason, str(problem.filename or self.job.output), hint)
        except Exception as problem:  # whatever it is, it is this model's alone
            self.failure = (
                stage,
                QuantError(f"{type(problem).__name__}: {problem}", "", "Please report it"),
            )
        return None

    def _publish(self) -> None:
        self.files = publish(self.stages.folder / "out", self.job.output)

    def _row(self) -> dict[str, Any]:
        job = self.job
        row = plain_row(job, self.digest, self.started_at)
        row |= {"seconds": sum(run["seconds"] for run in self.answers.values())}
        row |= {
            "peak_bytes": max((run["peak_bytes"] for run in self.answers.values()), default=None)
        }
        if quantized := self._result("quantize"):
            row |= {
                key: quantized[key]
                for key in ("target", "saturation_safe", "size_bytes", "float_size_bytes")
            }
            row |= {"size_ratio": quantized["size_bytes"] / quantized["float_size_bytes"]}
            row |= {"trace": json.dumps(quantized["trace"]), "note": quantized["note"]}
        if validated := self._result("validate"):
            row |= {key: validated[key] for key in ("verdict", "reason")} | accuracy_of(
                job, validated["fidelity"]
            )
        if timing := self._result("benchmark"):
            timing = timing["timing"]
            row |= {key: timing[key] for key in ("float_ms", "quantized_ms", "speedup")}
            row |= {key: self.answers["benchmark"].get(key) for key in ("host_load", "busy")}
        if job.contract and row["verdict"] == "met":
            row |= _kept_rest(job, row)
        if self.failure is not None:
            stage, problem = self.failure
            row |= failed(stage, problem)
        return dict(plain(row))

    def _stats(self) -> list[str]:
        calibrated = self._result("calibrate")
        return list(calibrated["stats"]) if calibrated else []

    def _result(self, stage: str) -> Any:
        return self.answers[stage]["result"] if stage in self.answers else None


def plain_row(job: Job, digest: str, started_at: str) -> dict[str, Any]:
    """The models row of a job of which nothing is known yet but what was asked."""
    config = job.config.to_dict()
    return {
        "model": job.name,
        "digest": digest,
        "input": str(job.input),
        "output": str(job.output),
        "outcome": "done",
        "verdict": "none",
        **{key: config[key] for key in ("bits", "mode", "method", "target")},
        "metric": job.contract.metric if job.contract else None,
        "config": json.dumps(config),
        "started_at": started_at,
        "finished_at": _now(),
    }


def failed(stage: str, problem: QuantError) -> dict[str, Any]:
    """What a failure changes in a models row."""
    return {
        "outcome": "failed",
        "verdict": "none",
        "reason": None,
        "note": None,
        "stage": stage,
        "error": problem.problem,
        "where": problem.where,
        "hint": problem.hint,
    }


def accuracy_of(job: Job, fidelity: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of accuracy: the contract's metric, or the default one, and what else was measured."""
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


def _kept_rest(job: Job, row: Mapping[str, Any]) -> dict[str, Any]:
    """Speed and size, which only the benchmark and the finished file can tell."""
    contract = job.contract
    assert contract is not None
    missed = []
    if (
        contract.min_speedup is not None
        and row.get("speedup") is not None
        and row["speedup"] < contract.min_speedup
    ):
        missed.append(f"speedup {row['speedup']:.2f}, at least {contract.min_speedup:g}")
    if contract.max_size_ratio is not None and row["size_ratio"] > contract.max_size_ratio:
        missed.append(f"size {row['size_ratio']:.3f}, at most {contract.max_size_ratio:g}")
    return {"verdict": "not_met", "reason": "; ".join(missed)} if missed else {}


def _timing(stage: str, run: Run) -> dict[str, Any]:
    own = {
        "stage": stage,
        **{
            key: run.get(key)
            for key in ("started_at", "seconds", "peak_bytes", "host_load", "busy")
        },
    }
    return own | (run["result"]["timing"] if stage == "benchmark" else {})


def _now() -> str:
    return datetime.now(UTC).isoformat()

"""Metrics `module:function` are code: they run only if the caller says so, not the manifest."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from flows.manifest.jobs import Job
from quant_core.errors import RequestError
from quant_core.metrics import custom_metric_in


def check_custom_metrics(jobs: Iterable[Job], allow_code: str | Path | None) -> None:
    """Raises: RequestError if a contract's metric is code that the caller did not allow."""
    if allow_code is not None:
        if not Path(allow_code).is_dir():
            raise RequestError("is no folder", str(allow_code), "--allow-code names a folder")
        return
    if metric := next(filter(None, map(custom_metric_of, jobs)), None):
        # It imports numpy, and hardly any manifest names such a metric.
        from quant_core.evaluate.custom_metric import not_allowed

        raise not_allowed(metric)


def custom_metric_of(job: Job) -> str | None:
    """The metric `module:function` of the job's contract; None if its metric is no code."""
    return custom_metric_in(job.contract.metric) if job.contract else None

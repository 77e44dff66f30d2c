"""The batch as a Prefect flow; batch.py tells what it does."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from flows.runtime.prefect_api import quiet_environment

quiet_environment()

# Prefect reads its settings when it is imported.
from prefect import Flow, flow
from prefect.client.schemas.objects import FlowRun, State
from prefect.states import Completed, Failed
from pydantic import Field

from flows.batch.batch import Batch
from flows.batch.flow_run import caller_or_cluster, current_caller, shown_in_prefect, untagged
from flows.batch.record import Record
from flows.batch.run_summary import (
    name_flow_run,
    summarize,
    summarize_failure,
    summary_path,
    working_in,
)
from flows.console.result import BatchResult
from flows.console.run_views import batch_lines
from flows.manifest.read import read_manifest
from flows.runtime.run_options import RunOptions
from quant_core.errors import QuantError


def _summarize_failure(flow: Flow[Any, Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Prefect's hook for a batch that broke off: write a summary among its reports.

    A manifest that cannot be read names no folder of reports; then it lies beside the manifest.
    """
    caller, path = current_caller(), Path(flow_run.parameters["manifest"])
    try:
        manifest = caller.manifest if caller else read_manifest(path)
        summary = summary_path("batch", manifest.folder)
    except QuantError:
        summary = path.with_name(f"{path.name}.summary.json")
    summarize_failure("batch", flow_run, state, summary)


@flow(
    name="quantmill-batch",
    flow_run_name="batch {manifest}",
    persist_result=False,
    on_failure=[_summarize_failure],
    on_crashed=[_summarize_failure],
)
def batch(
    manifest: str,
    scheduler: str | None = None,
    jobs: Annotated[int, Field(ge=1)] | None = None,
    force: bool = False,
    only: list[str] | None = None,
    allow_code: str | None = None,
) -> State[Any]:
    """Make every model of a manifest, and report.

    Args:
        manifest: A YAML or TOML file, as README.md shows one.
        scheduler: A Dask scheduler's address; without one, workers on this host.
        jobs: How many workers; without it, as many as cores and memory allow.
        force: Make again what is up to date.
        only: Globs over the names of models; without them, all.
        allow_code: The folder of metrics `module:function`; without it, none may run.
    """
    caller_or_own = caller_or_cluster(
        lambda: read_manifest(manifest), working_in, scheduler, jobs, allow_code
    )
    with caller_or_own as caller, untagged():
        assert caller.journal is not None
        summary = summary_path("batch", caller.manifest.folder)
        name_flow_run(summary)
        options = RunOptions(only=only or (), force=force, allow_code=caller.allow_code)
        record = Record(caller.manifest, caller.journal, caller.notify, options)
        record.notify = shown_in_prefect("batch", len(record.jobs), caller.notify)
        result = Batch(record, caller).run()
        record.forget_answers(caller.store)
        state = _state(result)
        summarize("batch", result, state, batch_lines, summary)
        caller.on_end(result)
    return state


def _state(result: BatchResult) -> State[Any]:
    """How the batch ended, as Prefect's state. It carries the result."""
    ended = Failed if result.state == "Failed" else Completed
    return ended(name=result.state, message=result.message, data=result)

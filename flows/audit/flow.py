"""The audit as a Prefect flow; audit.py tells what it does."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from flows.regression import MAX_SLOWDOWN
from flows.runtime.prefect_api import quiet_environment

quiet_environment()

# Prefect reads its settings when it is imported.
from prefect import Flow, flow
from prefect.client.schemas.objects import FlowRun, State
from prefect.states import Completed, Failed
from pydantic import Field

from flows.audit.audit import Audit
from flows.audit.published import manifest_of, read_published
from flows.batch.flow_run import caller_or_cluster, untagged
from flows.batch.run_summary import (
    auditing,
    name_flow_run,
    summarize,
    summarize_failure,
    summary_path,
)
from flows.console.run_views import audit_lines


@flow(name="quantmill-audit", flow_run_name="audit {output_dir}", persist_result=False)
def audit(
    output_dir: str,
    scheduler: str | None = None,
    jobs: Annotated[int, Field(ge=1)] | None = None,
    only: list[str] | None = None,
    max_slowdown: Annotated[float, Field(ge=0, lt=1)] = MAX_SLOWDOWN,
    allow_code: str | None = None,
) -> State[Any]:
    """Judge and time again every model that a batch has made. A regression is a failed audit.

    Args:
        output_dir: Where the batch has written.
        scheduler: A Dask scheduler's address; without one, workers on this host.
        jobs: How many workers; without it, as many as cores and memory allow.
        only: Globs over the names of models; without them, all.
        max_slowdown: The share of the speed-up that may be lost, beyond what varied when it was
            measured.
        allow_code: The folder of metrics `module:function`; without it, none may run.
    """
    folder = Path(output_dir).absolute()
    published, skipped_lines = read_published(folder, only or [])
    manifest = manifest_of(folder, published)
    caller_or_own = caller_or_cluster(
        lambda: manifest, lambda _: auditing(folder), scheduler, jobs, allow_code
    )
    summary = summary_path("audit", folder)
    with caller_or_own as caller, untagged():
        name_flow_run(summary)
        result = Audit(caller, published, max_slowdown, skipped_lines).run()
        ended = Failed if result.exit_code else Completed
        state: State[Any] = ended(message=result.message, data=result)
        summarize("audit", result, state, audit_lines, summary)
        caller.on_end(result)
    return state


@audit.on_failure
@audit.on_crashed
def _summarize_failure(flow: Flow[Any, Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Prefect's hook for an audit that broke off: write a summary where its reports would lie."""
    path = summary_path("audit", Path(flow_run.parameters["output_dir"]))
    if path.parent.is_dir():
        summarize_failure("audit", flow_run, state, path)

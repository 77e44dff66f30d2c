"""Makes every model of a manifest, on Dask, run by Prefect; or shows the plans."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

from flows.batch.digests import url_contents
from flows.console.events import Listener, Starting, ignore
from flows.console.result import BatchResult, Result
from flows.manifest.custom_metrics import check_custom_metrics
from flows.manifest.jobs import Job, Manifest, select
from flows.runtime.prefect_api import Prefect, unused_settings
from flows.runtime.process import importing
from flows.runtime.run_options import DEFAULT_OPTIONS, RunOptions
from flows.runtime.signals import stopped_at_once
from quant_core.errors import QuantError
from quant_core.worker.run import StageLimits, run_stage, shut_down
from tasks.remote import Remote, run_remote_stage

if TYPE_CHECKING:
    from rich.console import RenderableType

# run_batch alone imports Prefect and Dask: neither --help nor --dry-run waits for them.


def run_batch(
    manifest: Manifest,
    options: RunOptions = DEFAULT_OPTIONS,
    *,
    on_progress: Listener = ignore,
) -> BatchResult:
    """Make the models of a manifest on workers of this host, or of a Dask cluster.

    A model that fails is a row of the result.

    Raises: QuantError if the batch as a whole cannot be worked on.
    """
    from flows.batch.run_summary import working_in
    from flows.batch.up_to_date import report_if_up_to_date
    from flows.runtime.dask import api_and_dask, how_many_workers

    selected = select(manifest, options.only)
    check_custom_metrics(selected, options.allow_code)
    scheduler, jobs = options.scheduler, options.jobs
    workers = how_many_workers(len(selected), jobs, manifest.workers)
    with working_in(manifest) as journal, ExitStack() as stack:
        if options.prefect is Prefect.OWN:  # somebody else's shall see every run
            result = report_if_up_to_date(manifest, journal, options, on_progress)
            if result is not None:
                return result
        on_progress(Starting(unused_settings(options.prefect)))
        with importing():
            client = stack.enter_context(api_and_dask(workers, scheduler, options.prefect))
            from flows.batch.flow import batch
            from flows.batch.flow_run import Caller, call_flow

        caller = Caller(
            manifest,
            client,
            on_progress,
            allow_code=options.code,
            journal=journal,
            has_own_workers=scheduler is None,
        )
        name = str(manifest.file or manifest.folder)
        flow = partial(batch, name, scheduler, jobs, options.force, list(options.only))
        hint = "The same command goes on where it stopped"
        return call_flow("batch", flow, caller, BatchResult, hint)


def plan_batch(
    manifest: Manifest, options: RunOptions = DEFAULT_OPTIONS
) -> Iterator[dict[str, Any]]:
    """Each model's plan, or its error. Nothing is started but a child, and nothing is written."""
    selected = select(manifest, options.only)
    check_custom_metrics(selected, options.allow_code)
    try:
        for job in selected:
            yield _plan(job, manifest.limits.timeout_s)
    finally:
        shut_down()


def _plan(job: Job, timeout_s: float) -> dict[str, Any]:
    values = job.to_dict()
    row = {
        "model": job.name,
        "input": values["input"],
        "output": values["output"],
        "plan": None,
        "error": None,
    }
    with tempfile.TemporaryDirectory(prefix="quantmill-") as folder:
        request = {
            "model": values["input"],
            "config": values["config"],
            "samples": values["calibration"],
            "contract": values["contract"],
            "folder": folder,
        }
        try:
            contents = url_contents(job)
            run = partial(run_remote_stage, Remote(contents)) if contents else run_stage
            result = run("prepare", request, StageLimits(timeout_s))["result"]
        except QuantError as problem:
            error = {"error": problem.problem, "where": problem.where, "hint": problem.hint}
            return row | error
    return row | {"plan": result["plan"], "info": result["info"]}


def run_and_show(manifest: Manifest, options: RunOptions, *, as_json: bool) -> int:
    """Run `run_batch` and show it. Returns the exit code."""
    from flows.console import run_views

    return show_run(partial(run_batch, manifest, options), run_views.batch_table, as_json)


def show_plans(manifest: Manifest, options: RunOptions, *, as_json: bool) -> int:
    """Show each model's plan, or its error, as soon as it is known. Returns the exit code."""
    from flows.console import model_views, printing

    exit_code = 0
    for row in plan_batch(manifest, options):
        if row["error"] is not None:
            exit_code = 1
        if as_json:
            sys.stdout.write(json.dumps({"event": "plan", **row}) + "\n")
        else:
            printing.console().print(model_views.planned_view(row))
    return exit_code


def show_run(
    run: Callable[..., Result],
    table: Callable[[Sequence[Mapping[str, Any]]], RenderableType],
    as_json: bool,
) -> int:
    """Show the progress of a run while it works, and its table at the end. Returns the exit code.

    Ctrl-C and SIGTERM stop it at once.
    """
    from flows.console import printing
    from flows.console.progress import progress

    with stopped_at_once(), progress(as_json) as listener:
        result = run(on_progress=listener)
    printing.print_result(result, table, as_json)
    return result.exit_code

"""Is what a batch made still there, as right and as fast?"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from pathlib import Path

from flows.batch.run import show_run
from flows.console.events import Listener, Starting, ignore
from flows.console.result import AuditResult
from flows.manifest.custom_metrics import check_custom_metrics
from flows.regression import MAX_SLOWDOWN
from flows.runtime.prefect_api import unused_settings
from flows.runtime.process import importing
from flows.runtime.run_options import RunOptions

# run_audit alone imports Prefect and Dask: --help does not wait for them.


def run_audit(
    folder: Path,
    options: RunOptions,
    *,
    max_slowdown: float = MAX_SLOWDOWN,
    on_progress: Listener = ignore,
) -> AuditResult:
    """Audit what a batch has made in that folder.

    Raises: QuantError if there is nothing to audit.
    """
    from flows.audit.published import manifest_of, read_published
    from flows.batch.run_summary import auditing
    from flows.runtime.dask import api_and_dask, how_many_workers

    folder = folder.absolute()
    published, _ = read_published(folder, options.only)
    manifest = manifest_of(folder, published)
    check_custom_metrics(manifest.jobs, options.allow_code)
    scheduler, jobs = options.scheduler, options.jobs
    workers = how_many_workers(1, jobs)
    with auditing(folder), ExitStack() as stack:
        on_progress(Starting(unused_settings(options.prefect)))
        with importing():
            client = stack.enter_context(api_and_dask(workers, scheduler, options.prefect))
            from flows.audit.flow import audit
            from flows.batch.flow_run import Caller, call_flow

        caller = Caller(manifest, client, on_progress, allow_code=options.code)
        flow = partial(audit, str(folder), scheduler, jobs, list(options.only), max_slowdown)
        return call_flow("audit", flow, caller, AuditResult, "Run it again")


def audit_and_show(folder: Path, options: RunOptions, *, max_slowdown: float, as_json: bool) -> int:
    """Run `run_audit` and show it. Returns the exit code."""
    from flows.console import run_views

    run = partial(run_audit, folder, options, max_slowdown=max_slowdown)
    return show_run(run, run_views.audit_table, as_json)

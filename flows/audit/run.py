"""`python -m flows.audit OUTPUT_DIR`: is what a batch made still there, as right and as fast?"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from flows.batch.run import show_run
from flows.console.arguments import run_parser
from flows.console.events import Listener, Starting, ignore
from flows.console.result import AuditResult
from flows.manifest.code import check_code
from flows.runtime.prefect_api import Prefect, unused_settings
from quant_core.errors import QuantError
from quant_core.worker.child import STAGE_MODULE

# run_audit alone imports Prefect and Dask: --help does not wait for them.


def run_audit(
    folder: Path,
    *,
    scheduler: str | None = None,
    jobs: int | None = None,
    only: Sequence[str] = (),
    max_slowdown: float = 0.1,
    allow_code: str | Path | None = None,
    prefect: Prefect = Prefect.OWN,
    on_progress: Listener = ignore,
    module: str = STAGE_MODULE,
) -> AuditResult:
    """Audit what a batch has made in that folder.

    Raises: QuantError if there is nothing to audit.
    """
    from flows.audit.standing import manifest_of, read_standing
    from flows.batch.run_summary import auditing
    from flows.runtime.dask import api_and_dask, how_many_workers

    folder = folder.absolute()
    standing, _ = read_standing(folder, only)
    manifest = manifest_of(folder, standing)
    check_code(manifest.jobs, allow_code)
    code = None if allow_code is None else str(Path(allow_code).absolute())
    workers = how_many_workers(1, jobs)
    with auditing(folder), ExitStack() as stack:
        on_progress(Starting(unused_settings(prefect)))
        client = stack.enter_context(api_and_dask(workers, scheduler, prefect))
        from flows.audit.flow import audit
        from flows.batch.flow_run import Caller, call_flow

        caller = Caller(manifest, client, on_progress, module, code)
        flow = partial(audit, str(folder), scheduler, jobs, list(only), max_slowdown)
        return call_flow("audit", flow, caller, AuditResult, "Run it again")


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0 nothing got worse, 1 something did, 2 the request was wrong."""
    options = _parser().parse_args(arguments)
    as_json = options.format == "json"
    from flows.console import printing, run_views

    run = partial(
        run_audit,
        options.output_dir,
        scheduler=options.scheduler,
        jobs=options.jobs,
        only=options.only,
        max_slowdown=options.max_slowdown,
        allow_code=options.allow_code,
        prefect=Prefect(options.prefect),
    )
    try:
        return show_run(run, run_views.audit_table, as_json)
    except QuantError as problem:
        printing.print_error(problem, as_json)
        return problem.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = run_parser("flows.audit", __doc__)
    parser.add_argument("output_dir", type=Path, help="of a batch")
    parser.add_argument(
        "--max-slowdown",
        type=float,
        default=0.1,
        metavar="SHARE",
        help="of a speed-up (default: 0.1)",
    )
    return parser

"""`python -m flows.audit OUTPUT_DIR`: is all that a batch has made still there, as right and as fast, today?"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from flows.console.result import AuditResult, Listener
from flows.runtime.signals import in_another_thread, stopped_at_once
from quant_core.errors import QuantError, StageError
from quant_core.worker.child import STAGE_MODULE

# Prefect and Dask are imported by run_audit alone: --help does not wait for them.


def run_audit(
    folder: Path,
    *,
    scheduler: str | None = None,
    jobs: int | None = None,
    only: Sequence[str] = (),
    max_slowdown: float = 0.1,
    on_progress: Listener = lambda event: None,
    module: str = STAGE_MODULE,
) -> AuditResult:
    """Audit what a batch has made in that folder. Raises: QuantError if there is nothing to audit."""
    from flows.runtime.dask import api_and_dask, how_many_workers

    on_progress({"event": "starting"})
    with api_and_dask(how_many_workers(1, jobs), scheduler) as client:
        from prefect import tags

        from flows.audit.flow import audit, read_standing
        from flows.batch.flow import Attached, attach
        from flows.manifest.jobs import Manifest

        folder = folder.absolute()
        standing = read_standing(folder, only)
        manifest = Manifest(tuple(one.job for one in standing), folder)
        here = Attached(manifest, client, on_progress, module)
        flow = partial(audit, str(folder), scheduler, jobs, list(only), max_slowdown)
        with attach(here), tags("quantmill", "audit"):
            state = in_another_thread(lambda: flow(return_state=True))
    if not isinstance(here.result, AuditResult):
        problem = state.result(raise_on_failure=False)
        if isinstance(problem, QuantError):
            raise problem
        raise StageError(
            f"the audit stopped: {problem or state.message}", str(folder), "Run it again"
        )
    return here.result


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0 all stands, 1 something got worse, 2 the request was wrong."""
    asked = _parser().parse_args(arguments)
    as_json = asked.format == "json"
    from flows.console import render
    from flows.console.progress import progress

    try:
        with stopped_at_once(), progress(as_json) as listener:
            result = run_audit(
                asked.output_dir,
                scheduler=asked.scheduler,
                jobs=asked.jobs,
                only=asked.only,
                max_slowdown=asked.max_slowdown,
                on_progress=listener,
            )
    except QuantError as problem:
        render.print_error(problem, as_json)
        return problem.exit_code
    render.print_result(result, render.audit_table, as_json)
    return result.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m flows.audit", description=__doc__)
    parser.add_argument("output_dir", type=Path, help="of a batch")
    parser.add_argument(
        "--scheduler",
        metavar="ADDRESS",
        help="of a Dask cluster, say tcp://host:8786 (default: here)",
    )
    parser.add_argument(
        "--jobs", type=int, metavar="N", help="workers on this host (default: what fits)"
    )
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="GLOB",
        help="models of that name; may be repeated",
    )
    parser.add_argument(
        "--max-slowdown",
        type=float,
        default=0.1,
        metavar="SHARE",
        help="of a speed-up (default: 0.1)",
    )
    parser.add_argument(
        "--format", choices=("text", "json"), default="text", help="for people or for programs"
    )
    return parser

"""`python -m flows.batch MANIFEST`: make every model of a manifest, on Dask, orchestrated by Prefect."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from flows.console.result import BatchResult, Listener
from flows.manifest.jobs import Manifest, read_manifest, select
from flows.runtime.signals import in_another_thread, stopped_at_once, stopped_in_order
from quant_core.errors import QuantError, StageError
from quant_core.text import printable
from quant_core.worker.child import STAGE_MODULE, run_stage, shut_down

# Prefect and Dask are imported by run_batch alone: neither --help nor --dry-run waits for them.


def run_batch(
    manifest: Manifest,
    *,
    scheduler: str | None = None,
    jobs: int | None = None,
    force: bool = False,
    only: Sequence[str] = (),
    on_progress: Listener = lambda event: None,
    name: str = "",
    module: str = STAGE_MODULE,
) -> BatchResult:
    """Make the models of a manifest on workers of this host, or of the Dask `scheduler` at that address.

    A model that fails is a row of the result. Raises: QuantError if the batch as a whole cannot be worked on.
    """
    from flows.runtime.dask import api_and_dask, how_many_workers

    models = len(select(manifest, only))
    on_progress({"event": "starting"})
    with api_and_dask(how_many_workers(models, jobs, manifest.workers), scheduler) as client:
        from prefect import tags

        from flows.batch.flow import Attached, attach, batch

        here = Attached(manifest, client, on_progress, module)
        flow = partial(batch, name or str(manifest.folder), scheduler, jobs, force, list(only))
        with attach(here), tags("quantmill", "batch"):
            state = in_another_thread(lambda: flow(return_state=True))
    if not isinstance(here.result, BatchResult):
        problem = state.result(raise_on_failure=False)
        if isinstance(problem, QuantError):
            raise problem
        raise StageError(
            f"the batch stopped: {problem or state.message}",
            "",
            "The same command goes on where it stopped",
        )
    return here.result


def plan_batch(manifest: Manifest, *, only: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """What would be done: each model's plan, or its error. Nothing is started but a child, nothing is written."""
    try:
        for job in select(manifest, only):
            asked = job.to_dict()
            row = {
                "model": job.name,
                "input": asked["input"],
                "output": asked["output"],
                "plan": None,
                "error": None,
            }
            with tempfile.TemporaryDirectory(prefix="quantmill-") as folder:
                request = {
                    "model": asked["input"],
                    "config": asked["config"],
                    "samples": asked["calibration"],
                }
                limits = manifest.limits
                try:
                    run = run_stage(
                        "prepare", {**request, "folder": folder}, timeout_s=limits.timeout_s
                    )
                except QuantError as problem:
                    yield row | {
                        "error": problem.problem,
                        "where": problem.where,
                        "hint": problem.hint,
                    }
                else:
                    yield row | {"plan": run["result"]["plan"], "info": run["result"]["info"]}
    finally:
        shut_down()


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0 all met, 1 some model failed or missed its contract, 2 the request was wrong."""
    asked = _parser().parse_args(arguments)
    as_json = asked.format == "json"
    from flows.console import render

    try:
        manifest = read_manifest(asked.manifest)
        if asked.dry_run:
            with stopped_in_order():
                return _print_plans(manifest, asked.only, as_json)
        return run_and_show(
            manifest,
            scheduler=asked.scheduler,
            jobs=asked.jobs,
            force=asked.force,
            only=asked.only,
            as_json=as_json,
            name=asked.manifest,
        )
    except QuantError as problem:
        render.print_error(problem, as_json)
        return problem.exit_code


def run_and_show(manifest: Manifest, *, as_json: bool = False, **options: Any) -> int:
    """As `run_batch`, with progress while it works and a table at the end; Ctrl-C and SIGTERM stop it at once."""
    from flows.console import render
    from flows.console.progress import progress

    with stopped_at_once(), progress(as_json) as listener:
        result = run_batch(manifest, on_progress=listener, **options)
    render.print_result(result, render.batch_table, as_json)
    return result.exit_code


def _print_plans(manifest: Manifest, only: Sequence[str], as_json: bool) -> int:
    from flows.console import render

    wrong = 0
    for row in plan_batch(manifest, only=only):
        wrong |= row["error"] is not None
        if as_json:
            sys.stdout.write(json.dumps({"event": "plan", **row}) + "\n")
            continue
        render.console().print(
            f"{printable(row['model'])} -> {printable(row['output'])}", markup=False
        )
        if row["error"] is None:
            render.console().print(render.plan_view(row["plan"]))
        else:
            render.print_error(QuantError(row["error"], row["where"], row["hint"]), as_json=False)
    return int(wrong)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m flows.batch", description=__doc__)
    parser.add_argument("manifest", help="YAML or TOML")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the plans; start and write nothing"
    )
    parser.add_argument(
        "--scheduler",
        metavar="ADDRESS",
        help="of a Dask cluster, say tcp://host:8786 (default: here)",
    )
    parser.add_argument(
        "--jobs", type=int, metavar="N", help="workers on this host (default: what fits)"
    )
    parser.add_argument("--force", action="store_true", help="make again what is up to date")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="GLOB",
        help="models of that name; may be repeated",
    )
    parser.add_argument(
        "--format", choices=("text", "json"), default="text", help="for people or for programs"
    )
    return parser

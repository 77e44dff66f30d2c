"""Serves the nightly batch and the weekly audit: `python -m deployments.serve MANIFEST`.

PREFECT_API_URL, or Prefect's profile, names the server.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

from prefect import get_client, serve
from prefect.client.schemas.schedules import CronSchedule
from prefect.exceptions import ObjectNotFound

from flows.audit.flow import audit
from flows.batch.flow import batch
from flows.manifest.custom_metrics import check_custom_metrics
from flows.manifest.read import read_manifest
from flows.runtime.prefect_api import inherited_server
from quant_core.errors import QuantError, RequestError


def main() -> int:
    """Serve until interrupted. The manifest is checked now, and not first at two in the morning."""
    arguments = _parser().parse_args()
    code = arguments.allow_code and str(Path(arguments.allow_code).absolute())
    try:
        manifest = read_manifest(arguments.manifest)
        check_custom_metrics(manifest.jobs, code)
        print(f"Serving the runs of Prefect's server at {find_server()}", flush=True)
    except QuantError as problem:
        print(problem, file=sys.stderr)
        return problem.exit_code
    nightly = batch.to_deployment(
        name="nightly",
        cron=arguments.cron,
        tags=["quantmill", "batch"],
        parameters={
            "manifest": str(arguments.manifest.absolute()),
            "scheduler": arguments.scheduler,
            "allow_code": code,
        },
        concurrency_limit=1,
    )
    weekly = audit.to_deployment(
        name="weekly",
        cron=arguments.audit_cron,
        tags=["quantmill", "audit"],
        parameters={
            "output_dir": str(manifest.folder),
            "scheduler": arguments.scheduler,
            "allow_code": code,
        },
        concurrency_limit=1,
    )
    take_over([f"{batch.name}/nightly", f"{audit.name}/weekly"])
    serve(nightly, weekly, limit=1)  # one at a time: two would disturb each other's timings
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m deployments.serve", description=__doc__)
    parser.add_argument("manifest", type=Path, help="a YAML or TOML manifest")
    parser.add_argument(
        "--cron",
        type=_cron,
        default="0 2 * * *",
        help="when to make (default: every night at 2:00 UTC)",
    )
    parser.add_argument(
        "--audit-cron",
        type=_cron,
        default="0 5 * * 0",
        help="when to audit (default: on Sundays at 5:00 UTC)",
    )
    parser.add_argument(
        "--scheduler", help="address of a Dask cluster (default: workers on this host)"
    )
    parser.add_argument(
        "--allow-code", metavar="DIR", help="run metrics module:function, from this folder"
    )
    return parser


def _cron(text: str) -> str:
    """The text. Raises: ArgumentTypeError if it is no schedule of cron."""
    try:
        CronSchedule(cron=text)
    except ValueError:
        problem = f"is {text!r}; five fields are meant, as in '0 2 * * *'"
        raise argparse.ArgumentTypeError(problem) from None
    return text


def find_server() -> str:
    """The address of the server. Raises: QuantError if none is named, or if it cannot be used."""
    url = inherited_server()
    if url is None:
        hint = "Start one: prefect server start; then PREFECT_API_URL=http://127.0.0.1:4200/api"
        raise RequestError("names no server", "PREFECT_API_URL", hint)
    return url


def take_over(names: Sequence[str]) -> None:
    """Delete the deployments of these names that belong to a work pool, as prefect.yaml makes them.

    Serving one would not take it out of its pool, so its runs would wait there for a worker.
    """
    with get_client(sync_client=True) as client:
        for name in names:
            with contextlib.suppress(ObjectNotFound):
                deployment = client.read_deployment_by_name(name)
                if pool := deployment.work_pool_name:
                    client.delete_deployment(deployment.id)
                    print(f"{name} is taken from the work pool {pool} and served here", flush=True)


if __name__ == "__main__":
    sys.exit(main())

"""Serves the nightly batch and the weekly audit: `python -m deployments.serve MANIFEST`.

PREFECT_API_URL names the server.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from prefect import serve

from flows.audit.flow import audit
from flows.batch.flow import batch
from flows.manifest.jobs import read_manifest
from quant_core.errors import QuantError


def main() -> int:
    """Serve until interrupted. The manifest is checked now, and not first at two in the morning."""
    parser = argparse.ArgumentParser(prog="python -m deployments.serve", description=__doc__)
    parser.add_argument("manifest", type=Path)
    parser.add_argument(
        "--cron", default="0 2 * * *", help="when to make (default: every night at 2:00 UTC)"
    )
    parser.add_argument(
        "--audit-cron", default="0 5 * * 0", help="when to audit (default: on Sundays at 5:00 UTC)"
    )
    parser.add_argument("--scheduler", help="of a Dask cluster (default: workers on this host)")
    arguments = parser.parse_args()
    try:
        manifest = read_manifest(arguments.manifest)
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
        },
        concurrency_limit=1,
    )
    weekly = audit.to_deployment(
        name="weekly",
        cron=arguments.audit_cron,
        tags=["quantmill", "audit"],
        parameters={"output_dir": str(manifest.folder), "scheduler": arguments.scheduler},
        concurrency_limit=1,
    )
    serve(nightly, weekly, limit=1)  # one at a time: two would disturb each other's timings
    return 0


if __name__ == "__main__":
    sys.exit(main())

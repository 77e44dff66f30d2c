"""The nightly batch from one process: `python -m deployments.serve MANIFEST`; PREFECT_API_URL names the server."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from flows.manifest import read_manifest
from flows.pipeline import batch
from quant_core.errors import QuantError


def main() -> int:
    """Serve until interrupted. The manifest is checked first: better now than at two in the morning."""
    parser = argparse.ArgumentParser(prog="python -m deployments.serve", description=__doc__)
    parser.add_argument("manifest", type=Path)
    parser.add_argument("--cron", default="0 2 * * *", help="when (default: every night at 2:00 UTC)")
    parser.add_argument("--scheduler", help="of a Dask cluster (default: workers on this host)")
    asked = parser.parse_args()
    try:
        read_manifest(asked.manifest)
    except QuantError as problem:
        print(problem, file=sys.stderr)
        return problem.exit_code
    batch.serve(
        name="nightly",
        cron=asked.cron,
        tags=["quantmill", "batch"],
        parameters={"manifest": str(asked.manifest.absolute()), "scheduler": asked.scheduler},
        limit=1,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

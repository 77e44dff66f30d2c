"""The options that `python -m flows.batch` and `python -m flows.audit` have in common."""

from __future__ import annotations

import argparse
from pathlib import Path

from flows.runtime.prefect_api import Prefect
from flows.runtime.run_options import RunOptions


def run_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """A parser for `python -m NAME` with --scheduler, --jobs, --only and --format."""
    parser = argparse.ArgumentParser(prog=f"python -m {name}", description=description)
    parser.add_argument(
        "--scheduler",
        metavar="ADDRESS",
        help="use the Dask cluster at tcp://HOST:8786 (default: workers on this host)",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="how many workers on this host (default: as many as fit)",
    )
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="GLOB",
        help="only models of this name; repeatable",
    )
    parser.add_argument(
        "--allow-code",
        type=Path,
        metavar="DIR",
        help="folder from which metrics module:function may run",
    )
    parser.add_argument(
        "--prefect",
        choices=("own", "inherit"),
        default="own",
        help="start a Prefect server of its own, or use PREFECT_* (default: own)",
    )
    parser.add_argument(
        "--format",
        choices=("text", "json"),
        default="text",
        help="text for people, json for programs (default: text)",
    )
    return parser


def options_of(parsed: argparse.Namespace, *, force: bool = False) -> RunOptions:
    """The options that such a parser has read."""
    return RunOptions(
        parsed.scheduler,
        parsed.jobs,
        parsed.only,
        force,
        parsed.allow_code,
        Prefect(parsed.prefect),
    )

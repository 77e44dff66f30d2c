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
        "--allow-code",
        type=Path,
        metavar="DIR",
        help="run metrics module:function, from this folder",
    )
    parser.add_argument(
        "--prefect",
        choices=("own", "inherit"),
        default="own",
        help="a server of our own, or PREFECT_* as set here (default: own)",
    )
    parser.add_argument(
        "--format", choices=("text", "json"), default="text", help="for people or for programs"
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

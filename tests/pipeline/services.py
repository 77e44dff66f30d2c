"""What tests do with services that run beside them: start them, and ask Prefect's API."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest

from quant_core.worker.run import run_stage
from tests.processes import wait_until

ROOT = Path(__file__).parents[2]
PREFECT = [sys.executable, "-m", "prefect"]


def serve(patch: pytest.MonkeyPatch, stages: str) -> None:
    """Let Dask workers run the stages of that module in place of the real ones."""
    patch.setattr("tasks.workers.run_stage", partial(run_stage, module=stages))


@contextlib.contextmanager
def running(command: Sequence[str], environment: dict[str, str]) -> Iterator[None]:
    """A service that runs as long as the block does, in the root of the repository."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        process.wait()


def wait_for_run(url: str, name: str) -> dict:
    """The first run of that name that is completed."""
    wanted = {"flow_runs": {"name": {"any_": [name]}, "state": {"type": {"any_": ["COMPLETED"]}}}}
    found: list[dict] = []
    wait_until(lambda: found.extend(ask(url, "/flow_runs/filter", wanted) or []) or found)
    return found[0]


def ask(url: str, path: str, body: dict | None = None, method: str | None = None):
    """What the API answers; None if it does not answer."""
    request = urllib.request.Request(
        url + path, None if body is None else json.dumps(body).encode(), method=method
    )
    request.add_header("Content-Type", "application/json")
    with contextlib.suppress(OSError):
        return json.loads(urllib.request.urlopen(request, timeout=10).read() or "null")
    return None

"""One real Prefect server and one real Dask cluster for the whole session."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest

from flows.console.events import ignore
from flows.console.result import BatchResult
from flows.manifest.jobs import Manifest
from flows.manifest.read import check_manifest
from flows.runtime.prefect_api import ENVIRONMENT
from flows.runtime.run_options import RunOptions
from tests.models import tiny_cnn
from tests.pipeline.faulty_stages import FAULTS
from tests.pipeline.services import PREFECT, ask, running, serve
from tests.processes import wait_until

FAULTY = "tests.pipeline.faulty_stages"
FAST = {"benchmark": {"seconds": 0.05}}
QUICK = {"mode": "weight_only"}  # few candidates, for tests of what happens around the search
EAGER = {
    "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "1",
    "PREFECT_RUNNER_POLL_FREQUENCY": "1",
    "PREFECT_LOGGING_LEVEL": "ERROR",
    "PREFECT_UI_ENABLED": "false",
}


@pytest.fixture(scope="session")
def migrated(tmp_path_factory) -> Path:
    """Where the harness leaves a database of Prefect for others, whose servers then start in half
    the time; all processes of the session share it.
    """
    own = tmp_path_factory.getbasetemp()
    return (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "prefect.db"


def prefect_home(home: Path, migrated: Path) -> Path:
    """A home for a server of Prefect, with the database of the harness if that is there."""
    home.mkdir(parents=True, exist_ok=True)
    if migrated.exists() and not (home / "prefect.db").exists():
        shutil.copy(migrated, home / "prefect.db")
    return home


def keep_database(home: Path, migrated: Path) -> None:
    """Copy the database of a server that is running to `migrated`, where it appears as a whole."""
    copy = home / "copy.db"
    with contextlib.closing(sqlite3.connect(home / "prefect.db")) as database:
        database.execute("VACUUM INTO ?", (str(copy),))
    copy.replace(migrated)


@pytest.fixture(scope="session")
def starting_server(tmp_path_factory, migrated) -> Iterator[Callable[[], None]]:
    """A server of Prefect that PREFECT_API_URL names; the call waits until it answers."""
    from flows.runtime.prefect_api import api_server

    cache = tmp_path_factory.mktemp("prefect")
    home = prefect_home(cache / "quantmill" / "prefect", migrated)

    def wait() -> None:
        server.wait()
        keep_database(home, migrated)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        patch.delenv("PREFECT_API_URL", raising=False)
        with api_server() as server:
            yield wait


@pytest.fixture(scope="session")
def harness(starting_server) -> Iterator[str]:
    """The address of a Dask scheduler with two workers, beside a server of Prefect."""
    from flows.runtime.dask import local_cluster

    with local_cluster(2) as cluster:
        starting_server()
        yield cluster.scheduler_address


@pytest.fixture(scope="session")
def api(tmp_path_factory, migrated) -> Iterator[tuple[str, dict[str, str]]]:
    """A server with its scheduler, and the environment in which everything finds it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    url = f"http://127.0.0.1:{port}/api"
    home = prefect_home(tmp_path_factory.mktemp("home"), migrated)
    places = {"PREFECT_HOME": str(home), "PREFECT_API_URL": url}
    environment = {**os.environ, **ENVIRONMENT, **EAGER, **places}
    start = ["server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with running([*PREFECT, *start], environment):
        wait_until(lambda: ask(url, "/health") is True)
        yield url, environment


@pytest.fixture
def run(harness):
    """`run_batch` in the harness. A model whose name holds a fault's name suffers that fault."""
    from flows.batch.run import run_batch

    def run(manifest: Manifest, on_progress=ignore, **options) -> BatchResult:
        how = RunOptions(scheduler=harness, **options)
        # Children that run other stages are started anew, which takes longer than a small batch.
        suffers = any(fault in job.name for job in manifest.jobs for fault in FAULTS)
        with pytest.MonkeyPatch.context() as patch:
            if suffers:
                serve(patch, FAULTY)
            return run_batch(manifest, how, on_progress=on_progress)

    return run


@pytest.fixture
def mill(tmp_path):
    """A function that makes models of the given names, their data, and a manifest of them."""

    def mill(*names: str, **options) -> Manifest:
        folder = tmp_path / "models"
        folder.mkdir(exist_ok=True)
        for seed, name in enumerate(names):
            if not (folder / f"{name}.onnx").exists():
                save_model(folder / f"{name}.onnx", seed)
        save_data(tmp_path / "data.npy")
        batch = {"input_dir": "models", "output_dir": "out", **options.pop("batch", {})}
        return check_manifest(
            {"calibration": {"data": "data.npy"}, "batch": batch, **FAST, **options}, tmp_path
        )

    return mill


def save_model(path: Path, seed: int = 0) -> None:
    onnx.save(tiny_cnn(seed=seed), path)
    age(path)


def save_data(path: Path, seed: int = 0) -> None:
    np.save(path, np.random.default_rng(seed).standard_normal((16, 3, 8, 8), dtype=np.float32))
    age(path)


def age(path: Path) -> None:
    """Make the file look old: a batch waits for a file that was written just now."""
    os.utime(path, (1e9, 1e9))

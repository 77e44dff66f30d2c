"""The Dask client that a run hands its stages to, and the workers that it starts on this host."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import resource_tracker
from typing import TYPE_CHECKING, Any

from flows.runtime.own_server import START_HINT
from flows.runtime.prefect_api import Prefect, api_server, settings_of_environment
from flows.runtime.tls import own_security
from quant_core.errors import QuantError, RequestError, reason_of
from quant_core.versions import PACKAGES
from quant_core.worker.memory import total_bytes, usable_cores
from quant_core.worker.run import warm_up
from tasks.workers import differences

if TYPE_CHECKING:
    from distributed import Client, LocalCluster

OUR_CLUSTER = {
    # A dead worker fails its stage at once; tasks/workers.py decides whether it is tried again.
    "distributed.scheduler.allowed-failures": 0,
    # Idle workers profile themselves a hundred times a second, which would disturb a benchmark.
    "distributed.worker.profile.enabled": False,
    "distributed.admin.tick.interval": "1s",
    "distributed.admin.system-monitor.interval": "5s",
    # On a busy host a worker that died needs longer than 15 s to come back; after that its place
    # would be given up for good. The same holds for the 30 s that it has to find its scheduler.
    "distributed.deploy.lost-worker-timeout": "1 day",
    "distributed.comm.timeouts.connect": "300s",
    # Code that a configuration of Dask names is for the clusters of its owner.
    "distributed.scheduler.preload": [],
    "distributed.nanny.preload": [],
    "distributed.worker.preload": [],
}
LOOPBACK = "127.0.0.1"
CONNECT_S = 5
MAX_WORKERS = 4096
VERSIONS_WAIT_S = 10  # for a worker to say which versions it has
WORKER_BYTES = 400 << 20  # of a worker and its child with a small model


def how_many_workers(models: int, *requested: int | None) -> int:
    """The first number in `requested`, else as many workers as cores, memory and models allow.

    How many of them work at once is decided by memory (quant_core/worker/memory.py).
    Raises: RequestError if fewer than one worker is requested.
    """
    for workers in requested:
        if workers is not None and not 1 <= workers <= MAX_WORKERS:
            raise RequestError(f"is {workers}", "jobs", f"1 to {MAX_WORKERS}")
        if workers is not None:
            return workers
    fit_in_memory = total_bytes() // WORKER_BYTES
    return max(1, min(usable_cores(), fit_in_memory, 4 * models))


@contextlib.contextmanager
def api_and_dask(workers: int, scheduler: str | None, prefect: Prefect) -> Iterator[Client]:
    """Prefect's API and a Dask client, started side by side and ended together.

    If `scheduler` is given, that cluster is used.

    Raises: QuantError if one of them cannot be started or used.
    """
    check_loopback()
    with contextlib.ExitStack() as stack:
        starting = stack.enter_context(ThreadPoolExecutor(1, "quantmill-dask"))
        server = stack.enter_context(api_server(prefect))
        cluster = starting.submit(lambda: stack.enter_context(dask_client(workers, scheduler)))
        # Prefect takes as long to import as server and cluster to start.
        stack.enter_context(settings_of_environment(prefect))
        client = cluster.result()
        if server is not None:
            server.wait()
        yield client


def check_loopback() -> None:
    """Raises: QuantError if this host cannot talk to itself, as in a namespace without `lo`."""
    try:
        with (
            socket.create_server((LOOPBACK, 0)) as server,
            socket.create_connection(server.getsockname(), CONNECT_S),
        ):
            pass
    except OSError as problem:
        hint = "Prefect and Dask need it: bring up the interface lo"
        raise QuantError(f"cannot be reached: {reason_of(problem)}", LOOPBACK, hint) from None


@contextlib.contextmanager
def dask_client(workers: int, scheduler: str | None) -> Iterator[Client]:
    """A client of the scheduler at that address, or of a new cluster on this host.

    Raises: RequestError if nobody answers at that address.
    """
    from distributed import Client

    for name in ("distributed", "tornado"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if scheduler is not None:
        with _connected(scheduler) as client:
            _warm_up(client)
            yield client
        return
    # TLS, because a scheduler runs any code for whoever on this host connects to its port.
    with local_cluster(workers, own_security()) as cluster:
        with _starting_workers():
            client = Client(cluster)  # type: ignore[no-untyped-call]
        try:
            _warm_up(client)
            yield client
        finally:
            with contextlib.suppress(Exception):
                client.close(timeout=2)  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def local_cluster(workers: int, security: Any = None) -> Iterator[LocalCluster]:
    """Worker processes of one thread each on this host, reachable from this host alone.

    One that dies is replaced, for which Dask's settings hold as long as the cluster lives.
    """
    import dask
    from distributed import LocalCluster

    _hide_main()
    _start_quiet_tracker()
    with dask.config.set(OUR_CLUSTER):
        with _starting_workers():
            cluster = LocalCluster(  # type: ignore[no-untyped-call]
                n_workers=workers,
                threads_per_worker=1,
                processes=True,
                host=LOOPBACK,
                dashboard_address=f"{LOOPBACK}:0",  # None takes a well-known port
                memory_limit=0,  # each stage's child has its own limit
                silence_logs=logging.CRITICAL,
                security=security,
            )
        try:
            yield cluster
        finally:
            with contextlib.suppress(Exception):
                cluster.close(timeout=4)


@contextlib.contextmanager
def _starting_workers() -> Iterator[None]:
    """Raises: QuantError if the block cannot start workers on this host."""
    try:
        yield
    except (RuntimeError, OSError) as problem:
        reason = str(problem) or type(problem).__name__
        raise QuantError(f"Dask's workers did not start: {reason}", "", START_HINT) from problem


@contextlib.contextmanager
def _connected(scheduler: str) -> Iterator[Client]:
    """A client of a scheduler that answers and has workers. Raises: RequestError otherwise."""
    from distributed import Client

    try:
        client = Client(scheduler, timeout=10)  # type: ignore[no-untyped-call]
    except (OSError, ValueError) as problem:
        reason = str(problem).splitlines()[0]
        raise RequestError(
            f"no Dask scheduler answers: {reason}", scheduler, "Say tcp://HOST:PORT"
        ) from None
    with contextlib.closing(client):
        if not client.scheduler_info()["workers"]:
            with contextlib.suppress(TimeoutError):
                client.wait_for_workers(1, timeout=60)
        if not client.scheduler_info()["workers"]:
            raise RequestError("has no workers", scheduler, f"Start some: dask worker {scheduler}")
        _check_workers(client, scheduler)
        yield client


def _check_workers(client: Client, scheduler: str) -> None:
    """Raises: RequestError if a worker lacks a package, or has another version of it."""

    def find_versions(names: tuple[str, ...]) -> dict[str, str]:
        # It is sent as code, so it must not need any package of ours.
        import importlib.util
        from importlib import metadata

        found = {}
        for name in names:
            try:
                found[name] = metadata.version(name)
            except metadata.PackageNotFoundError:
                found[name] = "unknown"
        if importlib.util.find_spec("quant_core") is None:
            found["quantmill"] = "none (no module quant_core)"
        return found

    addresses = list(client.scheduler_info(n_workers=-1)["workers"])
    calls = {
        address: client.submit(find_versions, PACKAGES, workers=[address], pure=False)
        for address in addresses
    }
    wrong = []
    for address, call in calls.items():
        with contextlib.suppress(TimeoutError):  # busy with another batch: each answer is checked
            if different := differences(call.result(timeout=VERSIONS_WAIT_S)):
                wrong.append(f"{address} has {different}")
    if wrong:
        problem = f"workers have other versions: {'; '.join(wrong)}"
        raise RequestError(problem, scheduler, "Install the same versions on all workers")


def _warm_up(client: Client) -> None:
    """Let each worker start its child. It is a task, since anything else blocks a busy worker."""
    from distributed import fire_and_forget

    for address in client.scheduler_info(n_workers=-1)["workers"]:
        fire_and_forget(client.submit(warm_up, workers=[address], pure=False))  # type: ignore[no-untyped-call]


def _start_quiet_tracker() -> None:
    """Start the process that frees what workers share if this one is killed.

    It would complain of that on stderr long after the command has ended. Its filters of warnings
    come from the environment.
    """
    before = os.environ.get("PYTHONWARNINGS")
    filters = filter(None, (before, "ignore:resource_tracker:UserWarning"))
    os.environ["PYTHONWARNINGS"] = ",".join(filters)
    try:
        resource_tracker.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONWARNINGS"]
        else:
            os.environ["PYTHONWARNINGS"] = before


def _hide_main() -> None:
    """Keep multiprocessing from importing the main module, which may be a user's script, again."""
    main = sys.modules["__main__"]
    main.__spec__ = None
    with contextlib.suppress(AttributeError):
        del main.__file__

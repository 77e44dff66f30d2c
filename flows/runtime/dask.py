"""Where the work runs: the one place that starts Prefect's API and Dask, side by side, and that ends them."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from flows.cli.doctor import usable_cores
from quant_core.errors import QuantError, RequestError
from quant_core.worker.child import KEPT_ENVIRONMENT, warm_up
from quant_core.worker.memory import total_bytes

if TYPE_CHECKING:
    from distributed import Client, LocalCluster

# Before prefect is imported, and only where the user has not said otherwise.
ENVIRONMENT = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",
    "PREFECT_LOGGING_LEVEL": "WARNING",
    "PREFECT_SERVER_LOGGING_LEVEL": "CRITICAL",
    "PREFECT_CLI_COLORS": "false",
}
WITH_EMBEDDED_SERVER = {
    "PREFECT_LOGGING_LEVEL": "CRITICAL",  # a model that fails is told in our words
    "PREFECT_LOGGING_INTERNAL_LEVEL": "CRITICAL",
    "PREFECT_LOGGING_TO_API_ENABLED": "false",
    "PREFECT_UI_ENABLED": "false",
    "PREFECT_API_BLOCKS_REGISTER_ON_START": "false",
}
OUR_CLUSTER = {
    # A worker that dies takes its stage with it: an ordinary exception at once, and our retries decide.
    "distributed.scheduler.allowed-failures": 0,
    # Idle workers look at themselves a hundred times a second, which a benchmark beside them would feel.
    "distributed.worker.profile.enabled": False,
    "distributed.admin.tick.interval": "1s",
    "distributed.admin.system-monitor.interval": "5s",
}
START_UP_S = 180
WORKER_BYTES = 400 << 20  # of a worker and its child with a small model
KEPT_HISTORY_BYTES = 256 << 20


def how_many_workers(models: int, *asked: int | None) -> int:
    """The first that is asked for; else as many as there are cores, and no more than the models can use.

    How many of them work at once is decided by memory (quant_core/room.py). Raises: RequestError for none.
    """
    if said := [workers for workers in asked if workers is not None]:
        if said[0] < 1:
            raise RequestError(f"is {said[0]}", "jobs", "At least 1")
        return said[0]
    idle = max(1, total_bytes() // WORKER_BYTES)
    return max(1, min(usable_cores(), idle, 4 * models))


@contextlib.contextmanager
def api_and_dask(workers: int, scheduler: str | None = None) -> Iterator[Client]:
    """Prefect's API and a Dask client, started side by side and ended together.

    `PREFECT_API_URL`, where set, is used instead of a server of our own, `scheduler` instead of a cluster of our own.
    """
    with contextlib.ExitStack() as stack:
        starting = stack.enter_context(ThreadPoolExecutor(1, "quantmill-dask"))
        server = stack.enter_context(api_server())
        cluster = starting.submit(lambda: stack.enter_context(dask_client(workers, scheduler)))
        from prefect.settings import (  # while the others start: it takes as long
            PREFECT_API_URL,
            temporary_settings,
        )

        # It may have been imported, and have read the environment, long ago.
        stack.enter_context(temporary_settings({PREFECT_API_URL: os.environ["PREFECT_API_URL"]}))
        client = cluster.result()
        if server is not None:
            server.wait()
        yield client


@contextlib.contextmanager
def dask_client(workers: int, scheduler: str | None = None) -> Iterator[Client]:
    """A client of the scheduler at that address, or of a cluster on this host that lives as long.

    Raises: RequestError if nobody answers at that address.
    """
    from distributed import Client
    from distributed.security import Security

    for name in ("distributed", "tornado"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if scheduler is not None:
        with _answering(scheduler) as client:
            _warm_up(client)
            yield client
        return
    # TLS with keys of its own: a scheduler's port runs any code for whoever on this host connects.
    cluster = local_cluster(workers, Security.temporary())  # type: ignore[no-untyped-call]
    client = Client(cluster)  # type: ignore[no-untyped-call]
    try:
        _warm_up(client)
        yield client
    finally:
        with contextlib.suppress(Exception):
            client.close(timeout=2)  # type: ignore[no-untyped-call]
        with contextlib.suppress(Exception):
            cluster.close(timeout=4)


def local_cluster(workers: int, security: Any = None) -> LocalCluster:
    """Worker processes of one thread each on this host, reachable from this host alone."""
    import dask
    from distributed import LocalCluster

    _hide_main()
    with dask.config.set(OUR_CLUSTER):
        return LocalCluster(  # type: ignore[no-untyped-call]
            n_workers=workers,
            threads_per_worker=1,
            processes=True,
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",  # None would take the port that others expect theirs on
            memory_limit=0,  # the child's own limit counts
            silence_logs=logging.CRITICAL,
            security=security,
        )


def quiet_environment() -> None:
    """Prefect offline and quiet. Call before prefect is imported."""
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)


def end_descendants() -> None:
    """Kill every process below this one, at once."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            parents[int(entry.parent.name)] = int(
                entry.read_text(errors="replace").rpartition(")")[2].split()[1]
            )
    below = {os.getpid()}
    while found := {pid for pid, parent in parents.items() if parent in below} - below:
        below |= found
    for pid in below - {os.getpid()}:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


# Prefect's API


class Server:
    """An API server on loopback. A dead one is replaced: the socket is ours, so its clients wait instead of failing."""

    def __init__(self, home: Path) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}/api"
        self.words: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the server
        self.environment = {key: value for key, value in os.environ.items() if _is_prefects(key)}
        self.environment |= {
            "PREFECT_HOME": str(home),
            "PYTHONPATH": os.pathsep.join(_import_paths()),
        }
        self.answered, self.stopping = threading.Event(), threading.Event()
        self.process = self._start()
        self.keeper = threading.Thread(target=self._keep_up, daemon=True)
        self.keeper.start()

    def _start(self) -> subprocess.Popen[bytes]:
        descriptor = self.listener.fileno()
        return subprocess.Popen(
            [sys.executable, "-m", "flows.runtime.api_server", str(descriptor)],
            stdin=subprocess.PIPE,
            stdout=self.words,
            stderr=self.words,
            pass_fds=(descriptor,),
            env=self.environment,
            start_new_session=True,
        )

    def _keep_up(self) -> None:
        """A server that never answered is not tried again: its reason would be the same."""
        while not self.stopping.wait(0.2):
            if self.answered.is_set() and self.process.poll() is not None:
                self.process = self._start()

    def wait(self) -> None:
        """Until it answers. Raises: QuantError if it died or stayed silent."""
        deadline = time.monotonic() + START_UP_S
        while time.monotonic() < deadline and self.process.poll() is None:
            # The socket listens from the start, so the first request waits for the answer by itself.
            with (
                contextlib.suppress(OSError),
                urllib.request.urlopen(f"{self.url}/health", timeout=START_UP_S) as answer,
            ):
                if answer.status == 200:
                    self.answered.set()
                    return
            time.sleep(0.05)
        self.words.seek(0)
        lines = self.words.read().decode(errors="replace").strip().splitlines() or [
            "it left no message"
        ]
        raise QuantError(
            f"Prefect's API did not start: {lines[-1]}",
            "",
            "`quantmill doctor` checks the versions",
        )

    def stop(self) -> None:
        """Killed: it holds nothing that we need, and asking politely takes seconds."""
        self.stopping.set()
        self.keeper.join()
        self.process.kill()
        self.process.wait()
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.words.close()
        self.listener.close()


def _is_prefects(key: str) -> bool:
    """Whether the server needs that environment variable: it gets no more, as a child does."""
    return key in KEPT_ENVIRONMENT or key == "DO_NOT_TRACK" or key.startswith("PREFECT_")


@contextlib.contextmanager
def api_server() -> Iterator[Server | None]:
    """A server of our own, unless PREFECT_API_URL names one; for as long, PREFECT_API_URL names ours."""
    if os.environ.get("PREFECT_API_URL"):
        quiet_environment()
        yield None
        return
    ours = ["PREFECT_API_URL", *(key for key in WITH_EMBEDDED_SERVER if key not in os.environ)]
    os.environ.pop("PREFECT_API_URL", None)
    with _home() as home:
        os.environ.update({key: WITH_EMBEDDED_SERVER[key] for key in ours[1:]})
        quiet_environment()
        server = Server(home)
        os.environ["PREFECT_API_URL"] = server.url
        try:
            yield server
        finally:
            for key in ours:
                os.environ.pop(key, None)
            server.stop()


@contextlib.contextmanager
def _home() -> Iterator[Path]:
    """A folder that no other server uses meanwhile: two on one SQLite file would wait for each other."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    home = Path(os.environ.get("PREFECT_HOME") or cache / "quantmill" / "prefect")
    try:
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = os.open(home / "quantmill.lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError:  # a home that cannot be written is no reason to stop
        with tempfile.TemporaryDirectory(prefix="quantmill-prefect-") as folder:
            yield Path(folder)
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        with tempfile.TemporaryDirectory(
            prefix="quantmill-prefect-", ignore_cleanup_errors=True
        ) as folder:
            yield Path(folder)
    else:
        _forget_history(home)
        yield home
    finally:
        os.close(lock)


def _forget_history(home: Path) -> None:
    """The embedded server's database only grows, and nobody reads it: start a new one now and then."""
    database = home / "prefect.db"
    if database.exists() and database.stat().st_size > KEPT_HISTORY_BYTES:
        for path in home.glob("prefect.db*"):
            path.unlink(missing_ok=True)


# Dask


@contextlib.contextmanager
def _answering(scheduler: str) -> Iterator[Client]:
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
        yield client


def _warm_up(client: Client) -> None:
    """Let each worker start its child; as a task, because what runs beside tasks would block a worker that is busy."""
    from distributed import fire_and_forget

    for address in client.scheduler_info(n_workers=-1)["workers"]:
        fire_and_forget(client.submit(warm_up, workers=[address], pure=False))  # type: ignore[no-untyped-call]


def _hide_main() -> None:
    """multiprocessing imports the parent's main module in every process it starts: all of a user's script, say."""
    main = sys.modules["__main__"]
    main.__spec__ = None
    with contextlib.suppress(AttributeError):
        del main.__file__


def _import_paths() -> list[str]:
    return [str(Path(entry).absolute()) for entry in sys.path]

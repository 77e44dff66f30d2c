"""Prefect's environment, and the API server that a run starts if PREFECT_API_URL names none."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from quant_core.errors import QuantError
from quant_core.worker.child import KEPT_ENVIRONMENT

# Set before prefect is imported, unless the user has set the variable.
ENVIRONMENT = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",
    "PREFECT_LOGGING_LEVEL": "WARNING",
    "PREFECT_SERVER_LOGGING_LEVEL": "CRITICAL",
    "PREFECT_CLI_COLORS": "false",
}
WITH_EMBEDDED_SERVER = {
    "PREFECT_LOGGING_LEVEL": "CRITICAL",  # a failed model is reported in our own words
    "PREFECT_LOGGING_INTERNAL_LEVEL": "CRITICAL",
    "PREFECT_LOGGING_TO_API_ENABLED": "false",
    "PREFECT_UI_ENABLED": "false",
    "PREFECT_API_BLOCKS_REGISTER_ON_START": "false",
}
START_UP_S = 180
KEPT_HISTORY_BYTES = 256 << 20


def quiet_environment() -> None:
    """Make Prefect quiet, and without telemetry. Call this before prefect is imported."""
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)


@contextlib.contextmanager
def api_server() -> Iterator[Server | None]:
    """Start an API server, or yield None if PREFECT_API_URL names one already.

    PREFECT_API_URL names the new server as long as it lives.
    """
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


class Server:
    """An API server process on loopback, which is replaced if it dies.

    The socket belongs to this process, so the clients of a dead server wait instead of failing.
    """

    def __init__(self, home: Path) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}/api"
        self.output: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `stop`
        self.environment = {key: value for key, value in os.environ.items() if _server_needs(key)}
        self.environment |= {
            "PREFECT_HOME": str(home),
            "PYTHONPATH": os.pathsep.join(_import_path()),
        }
        self.answered = threading.Event()
        self.stopping = threading.Event()
        self.process = self._start()
        self.restarter = threading.Thread(target=self._restart_when_dead, daemon=True)
        self.restarter.start()

    def _start(self) -> subprocess.Popen[bytes]:
        descriptor = self.listener.fileno()
        return subprocess.Popen(
            [sys.executable, "-m", "flows.runtime.api_server", str(descriptor)],
            stdin=subprocess.PIPE,
            stdout=self.output,
            stderr=self.output,
            pass_fds=(descriptor,),
            env=self.environment,
            start_new_session=True,
        )

    def _restart_when_dead(self) -> None:
        """Replace a dead server, unless it never answered: it would fail again likewise."""
        while not self.stopping.wait(0.2):
            if self.answered.is_set() and self.process.poll() is not None:
                self.process = self._start()

    def wait(self) -> None:
        """Wait until the server answers.

        Raises: QuantError if it dies, or does not answer within START_UP_S.
        """
        deadline = time.monotonic() + START_UP_S
        while time.monotonic() < deadline and self.process.poll() is None:
            # The socket listens from the start, so the first request waits for the server.
            with (
                contextlib.suppress(OSError),
                urllib.request.urlopen(f"{self.url}/health", timeout=START_UP_S) as answer,
            ):
                if answer.status == 200:
                    self.answered.set()
                    return
            time.sleep(0.05)
        self.output.seek(0)
        lines = self.output.read().decode(errors="replace").strip().splitlines()
        reason = lines[-1] if lines else "it left no message"
        hint = "`quantmill doctor` checks the versions"
        raise QuantError(f"Prefect's API did not start: {reason}", "", hint)

    def stop(self) -> None:
        """Kill the server: it holds nothing that we need, and a polite end takes seconds."""
        self.stopping.set()
        self.restarter.join()
        self.process.kill()
        self.process.wait()
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.output.close()
        self.listener.close()


def _server_needs(key: str) -> bool:
    """Whether the server gets that environment variable: as a stage's child, it gets no secrets."""
    return key in KEPT_ENVIRONMENT or key == "DO_NOT_TRACK" or key.startswith("PREFECT_")


@contextlib.contextmanager
def _home() -> Iterator[Path]:
    """A folder for one server alone: two servers on one SQLite file would wait for each other."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    home = Path(os.environ.get("PREFECT_HOME") or cache / "quantmill" / "prefect")
    try:
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = os.open(home / "quantmill.lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError:  # without a home that can be written, a temporary one does
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
    """Delete a large database of an earlier server: it only grows, and nobody reads it."""
    database = home / "prefect.db"
    if database.exists() and database.stat().st_size > KEPT_HISTORY_BYTES:
        for path in home.glob("prefect.db*"):
            path.unlink(missing_ok=True)


def _import_path() -> list[str]:
    """`sys.path`, valid in any working directory."""
    return [str(Path(entry).absolute()) for entry in sys.path]

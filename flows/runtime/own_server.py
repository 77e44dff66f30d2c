"""The Prefect server that a run starts for itself: a process that is replaced if it dies."""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import os
import re
import select
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

from quant_core.errors import QuantError
from quant_core.worker.child import KEPT_ENVIRONMENT, import_path
from quant_core.worker.folders import cache_folder

START_UP_S = 180
START_HINT = (
    "May this user start more processes, open more files and take more memory (ulimit -u, -n, -v)? "
    "`quantmill doctor` checks the versions"
)
NO_MESSAGE = "it left no message"
HEALTH_S = 5  # for an answer of the server, once it has one
KEPT_HISTORY_BYTES = 256 << 20


class Server:
    """An API server process on loopback, which is replaced if it dies.

    The socket belongs to this process, so the clients of a dead server wait instead of failing.
    """

    def __init__(self, home: Path) -> None:
        self.home = home
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}/api"
        self.output: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `stop`
        self.environment = {key: value for key, value in os.environ.items() if _server_needs(key)}
        self.environment |= {
            "PREFECT_HOME": str(home),
            "PYTHONPATH": os.pathsep.join(import_path()),
        }
        self.answered = threading.Event()
        self.stopping = threading.Event()
        self.process = self._start()
        self.restarter = threading.Thread(target=self._restart_when_dead, daemon=True)
        self.restarter.start()

    def _start(self) -> subprocess.Popen[bytes]:
        descriptor = self.listener.fileno()
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "flows.runtime.api_server", str(descriptor)],
            stdin=subprocess.PIPE,
            stdout=self.output,
            stderr=self.output,
            pass_fds=(descriptor,),
            env=self.environment,
            cwd=self.home,  # Prefect reads settings from files in its current folder
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
        while self._lives_before(deadline):
            with contextlib.suppress(OSError, http.client.HTTPException):
                if self._answers(deadline):
                    self.answered.set()
                    return
            time.sleep(0.05)
        self.output.seek(0)
        lines = self.output.read().decode(errors="replace").strip().splitlines() or [NO_MESSAGE]
        errors = [line for line in lines if re.match(r"\w*(Error|Exception): ", line)]
        reason = (errors or lines)[-1]
        raise QuantError(f"Prefect's API did not start: {reason}", "", START_HINT)

    def _lives_before(self, deadline: float) -> bool:
        return self.process.poll() is None and time.monotonic() < deadline

    def _answers(self, deadline: float) -> bool:
        """Whether it answers well, for which it is waited as long as it lives.

        The socket listens from the start, so a request waits for the server, even for a dead one.
        """
        place = urlsplit(self.url)
        with contextlib.closing(http.client.HTTPConnection(place.netloc, timeout=HEALTH_S)) as link:
            link.request("GET", f"{place.path}/health")
            while self._lives_before(deadline):
                if select.select([link.sock], [], [], 0.05)[0]:
                    return link.getresponse().status == 200
        return False

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


@contextlib.contextmanager
def server_home() -> Iterator[Path]:
    """A folder for one server alone: two servers on one SQLite file would wait for each other."""
    home = Path(os.environ.get("PREFECT_HOME") or cache_folder() / "prefect")
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
        yield home
    finally:
        os.close(lock)


def forget_history(home: Path) -> None:
    """Delete a large database of an earlier server: it only grows, and nobody reads it."""
    database = home / "prefect.db"
    if database.exists() and database.stat().st_size > KEPT_HISTORY_BYTES:
        for path in home.glob("prefect.db*"):
            path.unlink(missing_ok=True)


def _server_needs(key: str) -> bool:
    """Whether the server gets that environment variable: as a stage's child, it gets no secrets."""
    return key in KEPT_ENVIRONMENT or key == "DO_NOT_TRACK" or key.startswith("PREFECT_")

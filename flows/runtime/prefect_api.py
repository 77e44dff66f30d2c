"""Prefect's environment, and the API server that a run starts if PREFECT_API_URL names none."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import http.client
import os
import queue
import re
import select
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

from quant_core.errors import QuantError
from quant_core.worker.child import KEPT_ENVIRONMENT, import_path
from quant_core.worker.host import cache_folder

# Set before prefect is imported, unless the user has set the variable.
ENVIRONMENT = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",
    "PREFECT_CLIENT_MAX_RETRIES": "2",  # 6 s a request; its own 5 make a minute for each of several
    "PREFECT_LOGGING_LEVEL": "CRITICAL",  # failures are reported in our own words
    "PREFECT_LOGGING_INTERNAL_LEVEL": "CRITICAL",
    "PREFECT_SERVER_LOGGING_LEVEL": "CRITICAL",
    "PREFECT_CLI_COLORS": "false",
}
WITH_EMBEDDED_SERVER = {
    "PREFECT_LOGGING_TO_API_ENABLED": "false",
    "PREFECT_UI_ENABLED": "false",
    "PREFECT_API_BLOCKS_REGISTER_ON_START": "false",
}
START_UP_S = 180
START_HINT = (
    "May this user start more processes, open more files and take more memory (ulimit -u, -n, -v)? "
    "`quantmill doctor` checks the versions"
)
NO_MESSAGE = "it left no message"
ANSWER_S = 5  # for the server of somebody else
KEPT_HISTORY_BYTES = 256 << 20


class Prefect(StrEnum):
    """Whose Prefect a run uses.

    OWN      a server, a database and settings of our own; inherited PREFECT_* variables are unused
    INHERIT  what PREFECT_* variables and Prefect's profile say
    """

    OWN = "own"
    INHERIT = "inherit"


def unused_settings(prefect: Prefect) -> tuple[str, ...]:
    """Names of the variables that somebody set and that a run with a server of our own ignores."""
    if prefect is Prefect.INHERIT or _serving:
        return ()
    ours = {**ENVIRONMENT, **WITH_EMBEDDED_SERVER}
    return tuple(sorted(key for key in _inherited() if os.environ[key] != ours.get(key)))


def quiet_environment() -> None:
    """Make Prefect quiet, and without telemetry. Call this before prefect is imported."""
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)


@contextlib.contextmanager
def api_server(prefect: Prefect = Prefect.OWN) -> Iterator[Server | None]:
    """Start an API server; yield None if one runs in this process, or an inherited one is used.

    PREFECT_API_URL names the new server as long as it lives.

    Raises: QuantError if the inherited server cannot be used.
    """
    if _serving:
        yield None
        return
    if prefect is Prefect.INHERIT:
        quiet_environment()
        if inherited_server() is not None:
            yield None
            return
    before = {key: os.environ[key] for key in _inherited()}
    if prefect is Prefect.OWN:
        for key in before:
            del os.environ[key]
    with _home() as home:
        if prefect is Prefect.OWN:
            _forget_history(home)
        added = ENVIRONMENT | WITH_EMBEDDED_SERVER
        added |= {"PREFECT_HOME": str(home), "PREFECT_PROFILES_PATH": str(home / "profiles.toml")}
        for key, value in added.items():
            os.environ.setdefault(key, value)
        server = Server(home)
        os.environ["PREFECT_API_URL"] = server.url
        _serving.append(server)
        try:
            yield server
        finally:
            _serving.remove(server)
            for key in _inherited():
                del os.environ[key]
            os.environ.update(before)
            server.stop()


@contextlib.contextmanager
def settings_of_environment(prefect: Prefect) -> Iterator[None]:
    """Prefect's settings as the environment has them now.

    Prefect may have been imported before the server started; and where it looks for settings there
    are files too, in the current folder. A server of our own is told no events: nobody reads them
    there.
    """
    from prefect.events.clients import NullEventsClient
    from prefect.events.worker import EventsWorker
    from prefect.settings import (
        PREFECT_API_AUTH_STRING,
        PREFECT_API_KEY,
        PREFECT_API_URL,
        temporary_settings,
    )

    if not _serving:
        yield
        return
    secrets = {PREFECT_API_AUTH_STRING, PREFECT_API_KEY} if prefect is Prefect.OWN else set()
    url = {PREFECT_API_URL: _serving[-1].url}
    EventsWorker.set_client_override(NullEventsClient)
    try:
        with temporary_settings(url, restore_defaults=secrets):
            yield
    finally:
        EventsWorker.set_client_override(None)


def drop_events() -> None:
    """Forget what a lost server was still to learn of this process.

    Prefect's client would try to send each event for 7 s when this process ends, one after another.
    """
    from prefect.events.worker import EventsWorker

    # Prefect has no public way to do it.
    for service in list(getattr(EventsWorker, "_instances", {}).values()):
        with contextlib.suppress(AttributeError, queue.Empty):
            while True:
                service._queue.get_nowait()


_serving: list[Server] = []  # the server of this process, while it lives


def has_own_server() -> bool:
    """Whether this process has started a server, which nobody else looks at."""
    return bool(_serving)


def _inherited() -> list[str]:
    return [key for key in os.environ if key.startswith("PREFECT_")]


def inherited_server() -> str | None:
    """The address of the API that variables or profile name, which answers; None without one.

    Raises: QuantError if it is down, refuses us, or has no database.
    """
    import httpx
    from prefect.settings import get_current_settings

    api = get_current_settings().api
    if not api.url:
        return None
    headers = {}
    if api.auth_string is not None:
        secret = base64.b64encode(api.auth_string.get_secret_value().encode()).decode()
        headers["Authorization"] = f"Basic {secret}"
    if api.key is not None:
        headers["Authorization"] = f"Bearer {api.key.get_secret_value()}"
    hint = "Start it, or name another in PREFECT_API_URL"
    where = str(api.url)
    verify: ssl.SSLContext | bool = not api.tls_insecure_skip_verify
    if verify and api.ssl_cert_file:
        verify = ssl.create_default_context(cafile=api.ssl_cert_file)
    try:
        # It asks for the password, and it reads the database.
        answer = httpx.post(
            f"{where.rstrip('/')}/flows/count",
            json={},
            headers=headers,
            timeout=ANSWER_S,
            verify=verify,
        )
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as problem:
        reason = str(problem) or type(problem).__name__
        raise QuantError(f"Prefect's server does not answer: {reason}", where, hint) from None
    if answer.status_code in (401, 403):
        hint = "Set PREFECT_API_AUTH_STRING or PREFECT_API_KEY"
        flaw = f"Prefect's server refuses us, with status {answer.status_code}"
        raise QuantError(flaw, where, hint)
    if answer.status_code >= 500:
        flaw = f"Prefect's server has failed, with status {answer.status_code}"
        raise QuantError(flaw, where, "Is its database up?")
    if answer.status_code != 200:
        flaw = f"is no API of Prefect: status {answer.status_code}"
        raise QuantError(flaw, where, hint)
    return where


def is_lost() -> bool:
    """Whether an inherited server that this run began with does not answer any more.

    Prefect's client takes ten seconds for each request to find that out. A server of our own is
    started again.
    """
    if has_own_server():
        return False
    try:
        inherited_server()
    except QuantError:
        return True
    return False


def say_server() -> None:
    """A step of deployments/prefect.yaml: name the server that gets the deployments.

    Raises: QuantError if it cannot be used.
    """
    url = inherited_server()
    where = f"server at {url}" if url else "own server, which ends with this command"
    sys.stdout.write(f"Deploying to Prefect's {where}\n")


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
        with contextlib.closing(http.client.HTTPConnection(place.netloc, timeout=ANSWER_S)) as link:
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


def _server_needs(key: str) -> bool:
    """Whether the server gets that environment variable: as a stage's child, it gets no secrets."""
    return key in KEPT_ENVIRONMENT or key == "DO_NOT_TRACK" or key.startswith("PREFECT_")


@contextlib.contextmanager
def _home() -> Iterator[Path]:
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


def _forget_history(home: Path) -> None:
    """Delete a large database of an earlier server: it only grows, and nobody reads it."""
    database = home / "prefect.db"
    if database.exists() and database.stat().st_size > KEPT_HISTORY_BYTES:
        for path in home.glob("prefect.db*"):
            path.unlink(missing_ok=True)

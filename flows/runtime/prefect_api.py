"""Whose Prefect a run uses, and with which settings: a server of its own, or an inherited one."""

from __future__ import annotations

import base64
import contextlib
import os
import queue
import ssl
import sys
from collections.abc import Iterator
from enum import StrEnum
from typing import TYPE_CHECKING

from flows.runtime.own_server import Server, forget_history, server_home
from quant_core.errors import QuantError

if TYPE_CHECKING:
    from prefect.settings.models.api import APISettings

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
ANSWER_S = 5  # for the server of somebody else
START_IT = "Start it, or name another in PREFECT_API_URL"


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
    with server_home() as home:
        if prefect is Prefect.OWN:
            forget_history(home)
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
    where = str(api.url)
    verify: ssl.SSLContext | bool = not api.tls_insecure_skip_verify
    if verify and api.ssl_cert_file:
        verify = ssl.create_default_context(cafile=api.ssl_cert_file)
    try:
        # It asks for the password, and it reads the database.
        answer = httpx.post(
            f"{where.rstrip('/')}/flows/count",
            json={},
            headers=_credentials(api),
            timeout=ANSWER_S,
            verify=verify,
        )
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as problem:
        reason = str(problem) or type(problem).__name__
        raise QuantError(f"Prefect's server does not answer: {reason}", where, START_IT) from None
    if answer.status_code != 200:
        flaw, hint = _refusal(answer.status_code)
        raise QuantError(flaw, where, hint)
    return where


def _credentials(api: APISettings) -> dict[str, str]:
    """The header that names us to the server."""
    if api.key is not None:
        return {"Authorization": f"Bearer {api.key.get_secret_value()}"}
    if api.auth_string is not None:
        secret = base64.b64encode(api.auth_string.get_secret_value().encode()).decode()
        return {"Authorization": f"Basic {secret}"}
    return {}


def _refusal(status: int) -> tuple[str, str]:
    """What a status says of the server, and what to do about it."""
    if status in (401, 403):
        flaw = f"Prefect's server refuses us, with status {status}"
        return flaw, "Set PREFECT_API_AUTH_STRING or PREFECT_API_KEY"
    if status >= 500:
        return f"Prefect's server has failed, with status {status}", "Is its database up?"
    return f"is no API of Prefect: status {status}", START_IT


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

"""Repairs what a process inherits: standard streams, HOME, proxies, certificates, temporary folder.

A daemon starts it with closed streams, a container as a user without a home, a pipeline ends in
`head`, a company has a proxy. None of that may stop a batch.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import gc
import io
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from quant_core.errors import RequestError, reason_of

LOOPBACK = "127.0.0.1,localhost,::1"
PROXIES = ("http_proxy", "https_proxy", "all_proxy")


def own_process() -> None:
    """Repair the environment of this process, which runs one command. Call it before all else.

    Ends the process with exit code 2 if no temporary file can be written.
    """
    _open_standard_streams()
    sys.stdout = _as_stream(1, sys.stdout)
    sys.stderr = _as_stream(2, sys.stderr)
    _bypass_proxy_of_loopback()
    _drop_unreadable_certificates()
    try:
        tempfile.gettempdir()
    except FileNotFoundError as problem:
        hint = "Let TMPDIR name a folder that can be written"
        sys.stderr.write(f"{RequestError(reason_of(problem), 'TMPDIR', hint)}\n")
        raise SystemExit(RequestError.exit_code) from None
    _ensure_home()


def exit_code(code: int) -> int:
    """The exit code of a command, which has failed too if what it printed could not be written."""
    sys.stdout.flush()
    descriptor = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    return code or int(getattr(descriptor, "is_refused", False))


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Imports without looking for garbage, which they do not make: a sixth of their time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class _Descriptor(io.FileIO):
    """A standard stream. What cannot be written is dropped, so that work goes on.

    is_refused  whether anything but a reader that has left was the reason
    """

    is_refused = False

    def write(self, content: object, /) -> int:
        try:
            return super().write(content)  # type: ignore[arg-type]
        except OSError as problem:
            _point_at_null(self.fileno())
            if problem.errno not in (errno.EPIPE, errno.EIO):
                self.is_refused = True
                if self.fileno() == 1:
                    reason = f"error: standard output cannot be written: {reason_of(problem)}\n"
                    sys.stderr.write(reason)
            return super().write(content)  # type: ignore[arg-type]


def _open_standard_streams() -> None:
    """Open what is closed among the descriptors 0, 1 and 2: a file would get that number later."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            _point_at_null(descriptor)
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)  # noqa: SIM115


def _as_stream(descriptor: int, before: Any) -> io.TextIOWrapper:
    """A text stream that shows what it cannot encode with a backslash, and bears a closed pipe."""
    if before is not None:
        before.flush()
    raw = _Descriptor(descriptor, "w", closefd=False)
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=getattr(before, "encoding", None) or "utf-8",
        errors="backslashreplace",
        line_buffering=descriptor == 2 or raw.isatty(),
    )


def _point_at_null(descriptor: int) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    if null != descriptor:
        os.dup2(null, descriptor)
        os.close(null)


def _bypass_proxy_of_loopback() -> None:
    """Ask Prefect's API on this host without a proxy, and drop proxies that no client can use."""
    excepted = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    if excepted.strip() != "*":
        excepted = ",".join(filter(None, (excepted, LOOPBACK)))
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = excepted
    for name in [name for name in os.environ if name.lower() in PROXIES]:
        if urlsplit(os.environ[name]).scheme not in ("http", "https"):
            # httpx refuses to work at all beside a proxy that speaks SOCKS or has no scheme.
            del os.environ[name]


def _drop_unreadable_certificates() -> None:
    """Unset SSL_CERT_FILE if it names no certificates. OpenSSL passes over that; httpx gives up."""
    named = os.environ.get("SSL_CERT_FILE")
    if not named:
        return
    import ssl  # hardly anybody sets it

    try:
        ssl.create_default_context(cafile=named)
    except OSError:
        del os.environ["SSL_CERT_FILE"]


def _ensure_home() -> None:
    """Let HOME name a temporary folder if this user has none, and USER somebody."""
    if os.path.expanduser("~") == "~":  # noqa: PTH111 - Path.home() raises
        os.environ["HOME"] = tempfile.mkdtemp(prefix="quantmill-home-")
        atexit.register(shutil.rmtree, os.environ["HOME"], ignore_errors=True)
        os.environ.setdefault("USER", str(os.getuid()))

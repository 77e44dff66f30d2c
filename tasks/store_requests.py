"""A call of a store's client: repeated while the store is busy, and within a time limit.

Whatever goes wrong is an OSError that names the URL as its file, as it would be with a local file.
"""

from __future__ import annotations

import errno
import math
import re
import threading
import time
from collections.abc import Callable, Collection
from typing import TypeVar

from tasks.locations import Url

T = TypeVar("T")

REQUEST_S = 60.0  # for an answer without a file's content
RETRY_S = 10.0  # how long a request is tried again, beyond what the store's own client does
FIRST_S = 2.0  # the same, of a store without any answer so far: it may not be there at all
FIRST_PAUSE_S = 0.5
# Names of errors that every client of a store has as its own: somebody has to log in first.
REFUSAL = re.compile("Auth|Credential|Profile|RefreshError|Token")
# Those of a client that got no connection.
NO_CONNECTION = re.compile("Connect|ServiceRequest|NameResolution")
BUSY = {
    errno.EAGAIN,
    errno.EBUSY,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.EIO,
    errno.EPIPE,
    errno.EREMOTEIO,
    errno.ETIMEDOUT,
}


def request(
    url: Url, call: Callable[[], T], limit_s: float = REQUEST_S, passing: Collection[int] = BUSY
) -> T:
    """What the call returns, which is made again for a while if the store is busy.

    passing  errors that may be gone the next time

    Raises: OSError; TimeoutError, which is one, after `limit_s` seconds.
    """
    started, pause_s = time.monotonic(), FIRST_PAUSE_S
    store = url.scheme, *url.parts[:1]
    _SILENT_SINCE.setdefault(store, started)
    while True:
        try:
            result = _within(limit_s - (time.monotonic() - started), call)
        except Exception as problem:
            error = as_os_error(problem, url)
            if error.errno != errno.ECONNREFUSED:
                _SILENT_SINCE[store] = math.inf
            next_s = time.monotonic() + pause_s
            last_s = min(started + min(RETRY_S, limit_s), _SILENT_SINCE[store] + FIRST_S)
            if error.errno not in passing or next_s > last_s:
                raise error from problem
        else:
            _SILENT_SINCE[store] = math.inf
            return result
        time.sleep(pause_s)
        pause_s *= 2


# Store -> when it was first asked, infinity once it has answered anything at all.
_SILENT_SINCE: dict[tuple[str, ...], float] = {}


def _within(limit_s: float, call: Callable[[], T]) -> T:
    """What the call returns. Raises: as the call; TimeoutError if it takes longer.

    Few clients of stores can be given a time limit. A call that hangs keeps its thread, which does
    not keep this process from ending.
    """
    results: list[T] = []
    problems: list[BaseException] = []

    def work() -> None:
        try:
            results.append(call())
        except BaseException as problem:
            problems.append(problem)

    thread = threading.Thread(target=work, daemon=True, name="quantmill-store")
    thread.start()
    thread.join(max(0.0, limit_s))
    if problems:
        raise problems[0]
    if not results:
        raise TimeoutError(errno.ETIMEDOUT, f"the store did not answer within {limit_s:.0f} s")
    return results[0]


def as_os_error(problem: BaseException, url: Url) -> OSError:
    """Any exception of a store's client as an OSError that names the URL."""
    if not isinstance(problem, OSError) and REFUSAL.search(type(problem).__name__):
        problem = PermissionError(str(problem))
    known = {
        FileNotFoundError: (errno.ENOENT, "no such file"),
        FileExistsError: (errno.EEXIST, "exists"),
        PermissionError: (errno.EACCES, "the store refuses access"),
    }
    where = str(url)
    text = str(getattr(problem, "strerror", None) or problem) or type(problem).__name__
    text = without_secrets(text.splitlines()[0])
    for kind, (number, words) in known.items():
        if isinstance(problem, kind):
            says_more = kind is PermissionError or "bucket" in text.lower()
            return kind(number, f"{words}: {text}" if says_more else words, where)
    if isinstance(problem, OSError) and problem.errno is not None:
        return OSError(problem.errno, text, where)
    if isinstance(problem, NotImplementedError):
        return OSError(errno.EOPNOTSUPP, "the store has no such operation", where)
    if NO_CONNECTION.search(type(problem).__name__):
        return OSError(errno.ECONNREFUSED, f"the store cannot be reached: {text}", where)
    is_programming = isinstance(problem, (TypeError, ValueError, AttributeError, ImportError))
    number = errno.EINVAL if is_programming else errno.EIO
    return OSError(number, f"{type(problem).__name__}: {text}", where)


def without_secrets(text: str) -> str:
    """The text without the queries and passwords of the URLs in it."""
    text = re.sub(r"(https?://)[^/\s:@]*@", r"\1***@", text)
    text = re.sub(r"(://[^/\s:@]*):[^/\s@]*@", r"\1:***@", text)
    return re.sub(r"(://[^\s?#\"']*)[?#][^\s\"']*", r"\1?***", text)

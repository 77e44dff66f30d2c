"""What Ctrl-C, SIGTERM, a closed terminal and the limits of batch systems do: the exit code is 128
and the number of the signal, and no file is half written.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextvars import copy_context
from pathlib import Path
from types import FrameType
from typing import TypeVar

SIGNALS = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGXCPU,  # more CPU time than `ulimit -t` grants
    signal.SIGUSR1,  # these two announce the time limit of a job
    signal.SIGUSR2,
)
WAKE_S = 0.1

T = TypeVar("T")

# Signals concern the process as a whole, and so do these.
_BEFORE_STOP: list[Callable[[], None]] = []


@contextlib.contextmanager
def stopped_in_order() -> Iterator[None]:
    """For work in this process alone: a signal unwinds it, so that temporary files are removed."""

    def stop(number: int) -> None:
        raise _Stopped(number)

    try:
        with _handled_by(stop):
            yield
    except _Stopped as stopped:
        sys.stderr.write("stopped\n")
        raise SystemExit(128 + stopped.number) from None


@contextlib.contextmanager
def stopped_at_once() -> Iterator[None]:
    """For work with workers: a signal ends this process and all processes below it at once.

    What is finished is in the journal and the rest is done by the next run. A polite end would wait
    for native code, which cannot be interrupted.
    """

    def stop(number: int) -> None:
        for again in SIGNALS:
            signal.signal(again, signal.SIG_IGN)
        # Threads of this process would still complain of the processes that are gone.
        own_stderr = os.dup(2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        _kill_descendants()
        for action in _BEFORE_STOP:
            with contextlib.suppress(Exception):
                action()
        restore_cursor = "\x1b[?25h\r" if os.isatty(own_stderr) else ""
        os.write(
            own_stderr, f"{restore_cursor}stopped; the same command goes on from here\n".encode()
        )
        os._exit(128 + number)

    with _handled_by(stop):
        yield


@contextlib.contextmanager
def before_stop(action: Callable[[], None]) -> Iterator[None]:
    """If a signal stops this process while the block runs, `action` is called first."""
    _BEFORE_STOP.append(action)
    try:
        yield
    finally:
        _BEFORE_STOP.remove(action)


def in_another_thread(work: Callable[[], T]) -> T:
    """What `work` returns. In the main thread Prefect would handle SIGTERM, politely but late.

    The main thread wakes up every WAKE_S: handlers run only there, and the kernel may deliver a
    signal to another thread.
    """
    with ThreadPoolExecutor(1, "quantmill-flow") as beside:
        working = beside.submit(copy_context().run, work)
        while not working.done():
            wait([working], timeout=WAKE_S)
        return working.result()


def _kill_descendants() -> None:
    """Kill every process below this one."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            # "PID (NAME) STATE PARENT ...", where NAME may hold anything
            after_name = entry.read_text(errors="replace").rpartition(")")[2]
            parents[int(entry.parent.name)] = int(after_name.split()[1])
    below = {os.getpid()}
    while found := {pid for pid, parent in parents.items() if parent in below} - below:
        below |= found
    for pid in below - {os.getpid()}:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


class _Stopped(BaseException):
    """Raised by a signal. It is no KeyboardInterrupt, which typer turns into its own exit code."""

    def __init__(self, number: int) -> None:
        self.number = number


@contextlib.contextmanager
def _handled_by(stop: Callable[[int], None]) -> Iterator[None]:
    def handler(number: int, frame: FrameType | None) -> None:
        stop(number)

    before = {number: signal.signal(number, handler) for number in SIGNALS}
    for number, earlier in before.items():
        # `nohup` ignores SIGHUP; a shell ignores Ctrl-C for whatever it starts in the background
        if earlier is signal.SIG_IGN and number is not signal.SIGINT:
            signal.signal(number, signal.SIG_IGN)
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)

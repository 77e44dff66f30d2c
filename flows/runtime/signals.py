"""What Ctrl-C and SIGTERM do: exit code 130 or 143, and nothing half written."""

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

SIGNALS = (signal.SIGINT, signal.SIGTERM)
WAKE_S = 0.1

T = TypeVar("T")


@contextlib.contextmanager
def stopped_in_order() -> Iterator[None]:
    """What works in this process alone unwinds, and takes its temporary files with it."""

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
    """What has workers ends with all processes below it, without ceremony.

    Whatever is finished is in the journal, whatever is not is done again next time, and a polite end would wait for
    native code that cannot be interrupted.
    """

    def stop(number: int) -> None:
        for again in SIGNALS:
            signal.signal(again, signal.SIG_IGN)
        end_descendants()
        restore_cursor = "\x1b[?25h\r" if sys.stderr.isatty() else ""
        os.write(2, f"{restore_cursor}stopped; the same command goes on from here\n".encode())
        os._exit(128 + number)

    with _handled_by(stop):
        yield


def in_another_thread(work: Callable[[], T]) -> T:
    """What `work` returns. In the main thread Prefect would take over SIGTERM, and end politely but late.

    The main thread wakes up meanwhile: only there do handlers run, and the kernel may give a signal to another thread.
    """
    with ThreadPoolExecutor(1, "quantmill-flow") as beside:
        working = beside.submit(copy_context().run, work)
        while not working.done():
            wait([working], timeout=WAKE_S)
        return working.result()


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


class _Stopped(BaseException):
    """Not KeyboardInterrupt, of which typer makes an exit code of its own."""

    def __init__(self, number: int) -> None:
        self.number = number


@contextlib.contextmanager
def _handled_by(stop: Callable[[int], None]) -> Iterator[None]:
    def handler(number: int, frame: FrameType | None) -> None:
        stop(number)

    before = [signal.signal(number, handler) for number in SIGNALS]
    try:
        yield
    finally:
        for number, earlier in zip(SIGNALS, before, strict=True):
            signal.signal(number, earlier)

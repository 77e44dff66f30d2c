"""What Ctrl-C and SIGTERM do: exit code 130 or 143, and nothing half written."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


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
    from flows.runtime import end_descendants

    def stop(number: int) -> None:
        for again in SIGNALS:
            signal.signal(again, signal.SIG_IGN)
        end_descendants()
        restore_cursor = "\x1b[?25h\r" if sys.stderr.isatty() else ""
        os.write(2, f"{restore_cursor}stopped; the same command goes on from here\n".encode())
        os._exit(128 + number)

    with _handled_by(stop):
        yield


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

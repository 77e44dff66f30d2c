"""Stages that misbehave in every way, without a model."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import sys
import time
from pathlib import Path

from quant_core.errors import DataError
from quant_core.worker.child_main import serve


def echo(text):
    sys.stdout.write("noise\n")
    os.write(1, b"native noise\n")
    return {"text": text}


def pid():
    return {"pid": os.getpid()}


def environment():
    return {"keys": sorted(os.environ)}


def segfault():
    ctypes.string_at(0)


def abort():
    os.abort()


def leave():
    os._exit(3)


def exit():
    sys.exit(0)


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def disk_full():
    raise OSError(errno.ENOSPC, "No space left on device", "/somewhere")


def busy():
    raise OSError(errno.EBUSY, "Device or resource busy", "/somewhere")


def wrong_data():
    raise DataError("has NaN", "sample 3", "Clean it")


def bug():
    raise KeyError("x")


def too_large():
    raise MemoryError("931 GiB")


def hang(mark=None):
    if mark:
        Path(mark).write_text(str(os.getpid()))
    ctypes.PyDLL(None).sleep(3600)  # holds the interpreter's lock: no thread of ours can run


def kill_the_worker(ready):
    """Once that file is there."""
    while not Path(ready).exists():
        time.sleep(0.02)
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(60)


def hold(megabytes, mark, until):
    """So much memory, from when `mark` is there until `until` is."""
    held = b"x" * (megabytes << 20)
    Path(mark).touch()
    while not Path(until).exists():
        time.sleep(0.02)
    return {"held": len(held)}


def hog():
    held = []
    while True:
        held.append(b"x" * (1 << 24))


if __name__ == "__main__":
    names = (
        echo,
        pid,
        environment,
        segfault,
        abort,
        leave,
        exit,
        killed,
        disk_full,
        busy,
        wrong_data,
        bug,
        too_large,
    )
    serve({stage.__name__: stage for stage in (*names, hang, hog, hold, kill_the_worker)})

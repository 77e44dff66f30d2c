"""The real stages, but `quantize` fails for a model whose file name holds the name of a fault."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from quant_core.worker import stages
from quant_core.worker.child_main import serve


def quantize(**request: Any) -> dict[str, Any]:
    model = Path(request["model"])
    for name, fault in FAULTS.items():
        if name in model.name:
            fault(model)
    return stages.quantize(**request)


def _segfault(model: Path) -> None:
    ctypes.string_at(0)


def _hang(model: Path) -> None:
    ctypes.PyDLL(None).sleep(3600)  # holds the interpreter's lock, as native code that hangs may


def _hog(model: Path) -> NoReturn:
    held = []
    while True:
        held.append(bytearray(os.urandom(1 << 20)) * 16)


def _replaced(model: Path) -> None:
    """Another file takes the model's place, the first time only."""
    other = model.with_suffix(".other")
    if other.exists():
        other.replace(model)


def _lost_once(model: Path) -> None:
    """The child is killed from outside, the first time only."""
    mark = model.with_suffix(".lost")
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)


def _killer(model: Path) -> None:
    """The child kills its Dask worker, every time."""
    with model.with_suffix(".kills").open("a") as file:
        file.write("x")
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(60)


FAULTS: dict[str, Callable[[Path], None]] = {
    "segfault": _segfault,
    "hang": _hang,
    "hog": _hog,
    "replaced": _replaced,
    "astray": _lost_once,
    "killer": _killer,
}


if __name__ == "__main__":
    serve(stages.STAGES | {"quantize": quantize})

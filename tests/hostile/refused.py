"""A table of files that have to be refused before they cost anything."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from quant_core.data.npz import open_arrays
from quant_core.errors import DataError

Cases = dict[str, tuple[Callable[[Path], object], str]]


def adder(cases: Cases):
    """A decorator for functions that write a file, whose error has this message."""

    def case(message: str) -> Callable[[Callable[[Path], object]], Callable[[Path], object]]:
        def add(write: Callable[[Path], object]) -> Callable[[Path], object]:
            cases[write.__name__] = (write, message)
            return write

        return add

    return case


def check(cases: Cases, name: str, folder: Path) -> None:
    """It is refused with its message, with less than eight megabytes."""
    write, message = cases[name]
    write(folder / "samples")
    tracemalloc.start()

    with pytest.raises(DataError, match=message):
        open_arrays(folder / "samples")

    assert tracemalloc.get_traced_memory()[1] < 8e6
    tracemalloc.stop()

"""Arrays that are needed later: as many as fit stay in memory, the others are spilled to files."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Iterator, MutableMapping
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


class HeldFolder:
    """A temporary folder that is removed when nothing holds this any more."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="quantmill-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


class SpilledArrays(MutableMapping[str, NDArray[Any]]):
    """Arrays by name, of which at most `most_bytes` are in memory.

    An array that does not fit is written to a file, and is read anew each time. A file is deleted
    with the array, and all of them with this mapping.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._held: dict[str, NDArray[Any] | Path] = {}
        self._held_bytes = 0
        self._numbers = count()
        self._folder: HeldFolder | None = None

    def __setitem__(self, name: str, array: NDArray[Any]) -> None:
        self.pop(name, None)
        # onnxruntime's sequences, maps and strings are arrays of objects, which no .npy file holds.
        if array.dtype == object or self._held_bytes + array.nbytes <= self._most_bytes:
            self._held[name] = array
            self._held_bytes += array.nbytes
            return
        if self._folder is None:
            self._folder = HeldFolder()
        path = self._folder.path / f"{next(self._numbers)}.npy"
        np.save(path, array)
        self._held[name] = path

    def __getitem__(self, name: str) -> NDArray[Any]:
        found = self._held[name]
        return np.load(found) if isinstance(found, Path) else found

    def __delitem__(self, name: str) -> None:
        found = self._held.pop(name)
        if isinstance(found, Path):
            found.unlink()
        else:
            self._held_bytes -= found.nbytes

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)

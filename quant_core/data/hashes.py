"""Digests of samples: what is hashed of files, arrays, sequences and maps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from quant_core.errors import DataError, reason_of
from quant_core.model.containers import OBJECT, unboxed


def hash_file(path: Path, update: Callable[[bytes], None]) -> None:
    """Give `update` the size and the bytes of a file. Raises: DataError if it cannot be read."""
    try:
        with path.open("rb") as file:
            update(f"file {path.stat().st_size}\n".encode())
            while block := file.read(1 << 20):
                update(block)
    except OSError as error:
        raise DataError(
            f"cannot be read: {reason_of(error)}", str(path), "Check the path"
        ) from error


def hash_array(name: str, array: np.ndarray, update: Callable[[bytes], None]) -> None:
    """Give `update` the name, dtype, shape and bytes of the array, of strings in objects too."""
    if array.dtype == OBJECT:
        array = array.astype(str)  # an object's bytes are where it lies in memory
    update(f"array {name!r} {array.dtype.str} {array.shape}\n".encode())
    update(np.ascontiguousarray(array).tobytes())


def hash_value(name: str, value: np.ndarray, update: Callable[[bytes], None]) -> None:
    """Give `update` the name and the content of a value: a tensor, or, as an array of objects
    (containers.py), a sequence, a map or an absent value.
    """
    content = unboxed(value)
    if isinstance(content, np.ndarray):
        hash_array(name, content, update)
    elif isinstance(content, list):
        for item in content:
            hash_array(name, np.asarray(item), update)
    else:
        update(f"map {name!r} {content!r}\n".encode())

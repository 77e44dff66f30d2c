"""What makes samples what they are, handed to a hash: files, arrays, sequences and maps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from quant_core.errors import DataError, reason_of
from quant_core.model.containers import OBJECT, boxed, unboxed


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


def hash_container(name: str, value: Any, update: Callable[[bytes], None]) -> None:
    """Give `update` the name and the content of a sequence or a map, or that it is absent."""
    content = unboxed(boxed(value))
    if isinstance(content, list):
        for item in content:
            hash_array(name, np.asarray(item), update)
    else:
        update(f"map {name!r} {content!r}\n".encode())

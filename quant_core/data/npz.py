"""Arrays from .npy and .npz files that may be hostile.

They are read row by row, without pickles, and within declared limits.
"""

from __future__ import annotations

import io
import math
import re
import weakref
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy

from quant_core.errors import DataError

RESIDENT_BYTES = 16 << 20  # smaller files are read once and kept, larger ones by the row
MAX_BYTES = 16 << 30  # that one .npz may declare
MAX_MEMBERS = 1000
MAX_RATIO = 200  # declared bytes over compressed bytes
BOMB_BYTES = 256 << 20  # the ratio counts above this only: a constant mask packs 1000 to 1

HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
EXPORT = "Save it again with np.save or np.savez"
PLAIN = "Save plain arrays of numbers, or of text as numpy.str_"


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class StoredArray:
    """An array in a file, of which only slices of rows are read.

    `array[3:7]` has shape (4, *shape[1:]). Reading forward is cheap; in a compressed file, reading
    backward starts again from its beginning.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    where: str
    stream: IO[bytes] = field(repr=False)
    offset: int

    def __post_init__(self) -> None:
        weakref.finalize(self, self.stream.close)

    def __getitem__(self, rows: slice) -> np.ndarray:
        start, stop, _ = rows.indices(self.shape[0])
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        with _reading(self.where):
            # Read, not mapped: mapped pages count as this process's memory until the host needs it.
            self.stream.seek(self.offset + start * row_bytes)
            content = self.stream.read((stop - start) * row_bytes)
            return np.frombuffer(content, self.dtype).reshape(stop - start, *self.shape[1:])


Array = np.ndarray | StoredArray


def open_arrays(path: Path) -> dict[str, Array]:
    """The arrays of an .npz by name, or the array of an .npy under the name "".

    Raises: DataError if the file cannot be read, is neither, holds pickled objects, records or
    nothing, is cut short, or declares more than the limits above.
    """
    return _open_file(path, RESIDENT_BYTES)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """All arrays of the file, in memory. Raises: DataError as `open_arrays`."""
    opened = open_arrays(path)
    return {name: a if isinstance(a, np.ndarray) else a[:] for name, a in opened.items()}


def array_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the arrays, from the headers alone. Raises: DataError as `open_arrays`."""
    return {name: array.shape for name, array in _open_file(path, resident_bytes=0).items()}


def _open_file(path: Path, resident_bytes: int) -> dict[str, Array]:
    """The arrays of a file, in memory if it is no larger than that."""
    where = str(path)
    with _reading(where):
        if path.exists() and not path.is_file():
            # A pipe would be waited for, and a device never ends.
            raise DataError("is no regular file", where, EXPORT)
        with path.open("rb") as file:
            magic = file.read(6)
        if magic == npy.MAGIC_PREFIX:
            size = path.stat().st_size
            return {"": _open(path.open("rb"), size, where, resident=size <= resident_bytes)}
        if not magic.startswith(b"PK"):
            from quant_core.model.files import FETCH, is_lfs_pointer  # it imports onnx

            if is_lfs_pointer(path):
                raise DataError("is a pointer of Git LFS, not the samples", where, FETCH)
            raise DataError("is neither an .npy nor an .npz file", where, EXPORT)
        return _open_members(zipfile.ZipFile(path), where, resident_bytes)


def _open_members(archive: zipfile.ZipFile, where: str, resident_bytes: int) -> dict[str, Array]:
    members = archive.infolist()
    resident = _check_limits(members, where) <= resident_bytes
    arrays = {}
    for member in members:
        stream = archive.open(member)
        name = member.filename
        array = _open(stream, member.file_size, f"{where}:{name}", resident=resident)
        arrays[name.removesuffix(".npy")] = array
    return arrays


def _check_limits(members: list[zipfile.ZipInfo], where: str) -> int:
    """The bytes that an archive declares. Raises: DataError if that is more than the limits."""
    size = sum(member.file_size for member in members)
    packed = sum(member.compress_size for member in members)
    if not members:
        raise DataError("holds no array", where, EXPORT)
    if len(members) > MAX_MEMBERS or len({m.filename for m in members}) < len(members):
        raise DataError(
            f"holds {len(members)} arrays, or two of one name", where, "One array per model input"
        )
    if size > MAX_BYTES:
        raise DataError(
            f"unpacks to {size:,} bytes",
            where,
            f"At most {MAX_BYTES:,}: use a folder of .npz, or .npy",
        )
    if size > BOMB_BYTES and size > MAX_RATIO * packed:
        raise DataError(
            f"unpacks from {packed:,} to {size:,} bytes",
            where,
            "Looks like a zip bomb: use np.savez",
        )
    return size


def _open(stream: IO[bytes], size: int, where: str, *, resident: bool) -> Array:
    """The array whose header begins the stream; `size` counts the bytes of both."""
    with ExitStack() as closing:
        closing.callback(stream.close)
        version = npy.read_magic(stream)
        if version not in HEADERS:
            raise DataError(f"is .npy of version {version}", where, EXPORT)
        shape, fortran_order, dtype = _read_header(stream, version)
        if dtype.hasobject:
            raise DataError("holds pickled Python objects, which are never loaded", where, PLAIN)
        if dtype.kind not in "biufU":
            raise DataError(f"holds {dtype}, not numbers", where, PLAIN)
        count = math.prod(shape)
        if min(shape, default=1) < 0:
            raise DataError(f"has the shape {shape}", where, EXPORT)
        offset = stream.tell()
        nbytes = count * dtype.itemsize
        if offset + nbytes > size:
            problem = (
                f"is cut short: {dtype} {shape} takes {nbytes:,} bytes, {size - offset:,} are there"
            )
            raise DataError(problem, where, EXPORT)
        if resident or not shape or (fortran_order and len(shape) > 1):
            flat = np.frombuffer(stream.read(nbytes), dtype)
            return flat.reshape(shape, order="F" if fortran_order else "C")
        closing.pop_all()
        return StoredArray(shape, dtype, where, stream, offset)


def _read_header(stream: IO[bytes], version: tuple[int, int]) -> tuple[tuple[int, ...], bool, Any]:
    """Shape, whether it is in Fortran order, and dtype.

    Python 2 wrote the sizes of a shape as 3L, of which numpy warns on stderr.
    """
    width = 2 if version == (1, 0) else 4  # bytes of the length that comes first
    header = stream.read(int.from_bytes(stream.read(width), "little"))
    header = re.sub(rb"(\d)L\b", rb"\1", header)
    return HEADERS[version](io.BytesIO(len(header).to_bytes(width, "little") + header))


@contextmanager
def _reading(where: str) -> Iterator[None]:
    try:
        yield
    except (DataError, MemoryError):
        raise
    except FileNotFoundError as error:
        raise DataError("no such file", where, "Check the path") from error
    # zlib, lzma, struct, tokenize, RuntimeError: a hostile file can be wrong in many ways
    except Exception as error:
        raise DataError(
            f"cannot be read: {error or type(error).__name__}", where, EXPORT
        ) from error

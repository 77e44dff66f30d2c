"""Which files a model consists of, found without parsing it."""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Iterator
from pathlib import Path

# StringStringEntryProto("location", ...) of TensorProto.external_data, as every protobuf library
# writes it
LOCATION = re.compile(rb"\x0a\x08location\x12([\x01-\x7f]|[\x80-\xff][\x01-\x7f])")


def model_files(model: Path) -> Iterator[Path]:
    """The model, then the files beside it that hold its external data."""
    yield model
    for name in data_names(model):
        path = model.parent / name
        if path.is_file() and lies_beside(path, model):
            yield path


def disk_bytes(model: Path) -> int:
    """The size of the model's files. Raises: OSError."""
    return sum(path.stat().st_size for path in model_files(model))


def data_names(model: Path) -> list[str]:
    """The files of external data that a model names, relative to its folder.

    They are found without parsing the model: a hostile one may crash the parser, which therefore
    runs in a child only. A name too many does no harm.
    """
    with model.open("rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            return []
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            found = {_location(content, match) for match in LOCATION.finditer(content)}
    return sorted(name for name in found if "\0" not in name)


def lies_beside(file: Path, model: Path) -> bool:
    """Whether a file is really in the folder of the model, or in a folder below it.

    A model that is a link itself, as in the cache of a model hub, has two folders: that of the link
    and that of the real file. Links to data may lead into either.
    """
    folders = (model.parent.resolve(), model.resolve().parent)
    return any(file.resolve().is_relative_to(folder) for folder in folders)


def _location(content: mmap.mmap, match: re.Match[bytes]) -> str:
    size = match[1][0] if len(match[1]) == 1 else (match[1][0] & 127) | match[1][1] << 7
    return content[match.end() : match.end() + size].decode(errors="replace")

"""Archives as nobody's library would write them."""

from __future__ import annotations

import zipfile
from pathlib import Path


def header(shape: tuple[int, ...], descr: str = "<f4") -> bytes:
    text = repr({"descr": descr, "fortran_order": False, "shape": shape}).encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def write_zip(path: Path, members: dict[str, tuple[bytes, int]]) -> None:
    """An archive of these members: what begins each, and how many zeros follow."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, (begin, zeros) in members.items():
            with archive.open(name, "w") as file:
                file.write(begin)
                for _ in range(zeros >> 20):
                    file.write(bytes(1 << 20))
                file.write(bytes(zeros & (1 << 20) - 1))


def repeat_member(path: Path, times: int) -> None:
    """The directory lists its one member several times, under other names."""
    content = path.read_bytes()
    start, end = content.index(b"PK\x01\x02"), content.index(b"PK\x05\x06")
    entries = [content[start:end].replace(b"x.npy", b"%d.npy" % k) for k in range(times)]
    directory = b"".join(entries)
    tail = bytearray(content[end:])
    tail[8:10] = tail[10:12] = times.to_bytes(2, "little")
    tail[12:16] = len(directory).to_bytes(4, "little")
    path.write_bytes(content[:start] + directory + bytes(tail))

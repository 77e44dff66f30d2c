"""Samples are numbers: no pickle is loaded, no bomb unpacked, no pipe waited for."""

from __future__ import annotations

import io
import os
import pickle
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from quant_core.errors import DataError
from quant_core.stored import MAX_BYTES, MAX_MEMBERS, open_arrays, read_arrays

CASES: dict[str, tuple[Callable[[Path], object], str]] = {}


def case(told: str) -> Callable[[Callable[[Path], object]], Callable[[Path], object]]:
    """A row of CASES: writes a file, of which `told` is said."""

    def add(write: Callable[[Path], object]) -> Callable[[Path], object]:
        CASES[write.__name__] = (write, told)
        return write

    return add


class Mark:
    """Leaves a file behind when it is unpickled."""

    def __reduce__(self):
        return Path.touch, (Path("unpickled"),)


@case("pickled")
def objects_in_an_npy(path):
    with path.open("wb") as file:
        np.save(file, np.array([Mark()], object), allow_pickle=True)


@case("pickled")
def objects_in_an_npz(path):
    with path.open("wb") as file:
        np.savez(file, x=np.ones(3), y=np.array([Mark()], object))


@case("neither")
def a_pickle(path):
    path.write_bytes(pickle.dumps(Mark()))


@case("cannot be read")
def a_header_that_is_a_program(path):
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (__import__('pathlib').Path('unpickled').touch(),)}"
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)


@case("zip bomb")
def zeros_that_unpack_a_thousandfold(path):
    _zip(path, {"x.npy": (_header((1, 300 << 20), "|i1"), 300 << 20)})


@case(f"At most {MAX_BYTES:,}")
def more_than_may_be_declared(path):
    _zip(path, {"x.npy": (_header((4,)), 16)})
    content = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\x01\x02", 24), (b"PK\x03\x04", 22)):  # the uncompressed size, both times it stands
        at = content.index(signature) + offset
        content[at : at + 4] = b"\xfe\xff\xff\xff"
    content = bytes(content)
    # four gigabytes are as much as 32 bits say: five such members
    path.write_bytes(content)
    _repeat_member(path, 5)


@case("arrays")
def members_without_end(path):
    _zip(path, {f"x{k}.npy": (b"", 0) for k in range(MAX_MEMBERS + 1)})


@case("two of one name")
def two_members_of_one_name(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", _header((4,)) + bytes(16))
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("x.npy", _header((4,)) + bytes(16))


@case("cut short")
def a_shape_that_is_not_there(path):
    path.write_bytes(_header((1 << 40,)) + bytes(16))


@case("regular")
def a_pipe(path):
    os.mkfifo(path)


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_file_is_refused_before_it_costs_anything(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write, told = CASES[name]
    write(tmp_path / "samples")
    tracemalloc.start()

    with pytest.raises(DataError, match=told):
        open_arrays(tmp_path / "samples")

    assert tracemalloc.get_traced_memory()[1] < 8e6
    tracemalloc.stop()
    assert not (tmp_path / "unpickled").exists()


def test_no_member_is_written_anywhere_whatever_its_name(tmp_path):
    buffer = io.BytesIO()
    np.save(buffer, np.ones(3, np.float32))
    with zipfile.ZipFile(tmp_path / "s.npz", "w") as archive:
        archive.writestr("../../escaped.npy", buffer.getvalue())

    assert list(read_arrays(tmp_path / "s.npz")) == ["../../escaped"]
    assert [path.name for path in tmp_path.iterdir()] == ["s.npz"]


def _header(shape: tuple[int, ...], descr: str = "<f4") -> bytes:
    text = repr({"descr": descr, "fortran_order": False, "shape": shape}).encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def _zip(path: Path, members: dict[str, tuple[bytes, int]]) -> None:
    """An archive of these members: what begins each, and how many zeros follow."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, (begin, zeros) in members.items():
            with archive.open(name, "w") as file:
                file.write(begin)
                for _ in range(zeros >> 20):
                    file.write(bytes(1 << 20))
                file.write(bytes(zeros & (1 << 20) - 1))


def _repeat_member(path: Path, times: int) -> None:
    """The directory lists its one member several times, under other names."""
    content = path.read_bytes()
    start, end = content.index(b"PK\x01\x02"), content.index(b"PK\x05\x06")
    entries = [content[start:end].replace(b"x.npy", b"%d.npy" % k) for k in range(times)]
    directory = b"".join(entries)
    tail = bytearray(content[end:])
    tail[8:10] = tail[10:12] = times.to_bytes(2, "little")
    tail[12:16] = len(directory).to_bytes(4, "little")
    path.write_bytes(content[:start] + directory + bytes(tail))

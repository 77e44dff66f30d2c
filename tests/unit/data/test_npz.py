"""Arrays in files: what is broken, huge or missing is an error that names its place."""

from __future__ import annotations

import io
import pickle
import struct
import warnings
import zipfile

import numpy as np
import pytest

from quant_core.data import npz
from quant_core.errors import DataError
from tests.samples import IMAGE, images, opened, saved, zipped


def npy_bytes(array):
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=array.dtype.hasobject)
    return buffer.getvalue()


def huge_header(shape):
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode()


BROKEN = {
    "text": b"1,2,3\n",
    "nothing": b"",
    "pickle": pickle.dumps([1, 2]),
    "objects": npy_bytes(np.array([{}, "x"], dtype=object)),
    "records": npy_bytes(np.zeros(3, [("a", "f4")])),
    "cut short": npy_bytes(images(5))[:-3],
    "header only": npy_bytes(images(5))[:30],
    "a header that promises a petabyte": huge_header((1 << 48, 1)),
    "a negative size": huge_header((-1, -4, 2, 2)),
    "more samples than a day has seconds, of nothing": huge_header((1 << 60, 0)),
    "a header of nonsense": b"\x93NUMPY\x01\x00\x10\x00" + b"(" * 16,
    "an unknown version": b"\x93NUMPY\x09\x00" + b"x" * 64,
    "half a zip": b"PK\x03\x04" + b"\0" * 40,
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_a_data_error_wherever_it_lies(tmp_path, name):
    folder = tmp_path / "feeds"
    folder.mkdir()
    (path := tmp_path / "x.npy").write_bytes(BROKEN[name])
    (folder / "0.npz").write_bytes(BROKEN[name])

    for source in (
        path,
        folder,
        zipped(tmp_path / "x.npz", zipfile.ZIP_DEFLATED, image=BROKEN[name]),
    ):
        with pytest.raises(DataError) as caught:
            opened(source, IMAGE)[0]
        assert str(tmp_path) in caught.value.where
        assert caught.value.hint


def test_a_file_that_breaks_off_while_it_is_read_is_a_data_error(tmp_path, monkeypatch):
    monkeypatch.setattr(npz, "RESIDENT_BYTES", 0)
    path = saved(tmp_path / "x.npy", images(2000))
    samples = opened(path, IMAGE)
    path.write_bytes(path.read_bytes()[:-2000])

    with pytest.raises(DataError, match="cannot be read"):
        samples[1999]


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match="no such file") as caught:
        opened(tmp_path / "none.npz", IMAGE)

    assert caught.value.where == str(tmp_path / "none.npz")


def test_an_archive_that_declares_more_than_the_limits_is_not_unpacked(tmp_path, monkeypatch):
    path = zipped(
        tmp_path / "x.npz", zipfile.ZIP_DEFLATED, image=np.zeros((1000, 1, 2, 2), np.float32)
    )

    assert len(opened(path, IMAGE)) == 1000
    monkeypatch.setattr(npz, "BOMB_BYTES", 1000)
    monkeypatch.setattr(npz, "MAX_RATIO", 50)
    with pytest.raises(DataError, match="unpacks from"):
        opened(path, IMAGE)
    monkeypatch.setattr(npz, "MAX_BYTES", 1000)
    with pytest.raises(DataError, match="unpacks to"):
        opened(path, IMAGE)


def test_memory_does_not_grow_with_a_large_file(tmp_path, monkeypatch):
    """A large .npy and a compressed member are read by the row."""
    monkeypatch.setattr(npz, "RESIDENT_BYTES", 0)
    paths = [
        saved(tmp_path / "x.npy", images(100)),
        zipped(tmp_path / "x.npz", zipfile.ZIP_DEFLATED, image=images(100)),
    ]

    for path in paths:
        (array,) = npz.open_arrays(path).values()
        assert isinstance(array, npz.StoredArray)
        np.testing.assert_array_equal(array[7:9], images(100)[7:9])


def test_samples_that_are_a_pointer_of_git_lfs_are_named(tmp_path):
    path = tmp_path / "samples.npz"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")

    with pytest.raises(DataError, match="pointer of Git LFS") as caught:
        npz.open_arrays(path)

    assert "git lfs pull" in caught.value.hint


def test_what_python_2_wrote_is_read_without_a_warning(tmp_path):
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    (tmp_path / "old.npy").write_bytes(huge_header("(2L, 3L)") + values.tobytes())

    with warnings.catch_warnings(action="error"):
        array = npz.read_arrays(tmp_path / "old.npy")[""]

    np.testing.assert_array_equal(array, values)

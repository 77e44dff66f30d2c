"""Samples are numbers: no pickle is loaded, and no program runs, whatever file they come in."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from tests.hostile.refused import Cases, adder, check

CASES: Cases = {}
case = adder(CASES)


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
    program = b"__import__('pathlib').Path('unpickled').touch()"
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (" + program + b",)}"
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)


@pytest.mark.parametrize("name", CASES)
def test_a_pickle_is_refused_unread(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)

    check(CASES, name, tmp_path)

    assert not (tmp_path / "unpickled").exists()

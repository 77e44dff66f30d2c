"""Samples are read where they lie: no member of an archive is written, no pipe waited for."""

from __future__ import annotations

import io
import os
import zipfile

import numpy as np
import pytest

from quant_core.data.npz import open_arrays, read_arrays
from quant_core.errors import DataError


def test_a_pipe_is_refused_unread(tmp_path):
    os.mkfifo(tmp_path / "samples")

    with pytest.raises(DataError, match="regular"):
        open_arrays(tmp_path / "samples")


def test_no_member_is_written_anywhere_whatever_its_name(tmp_path):
    buffer = io.BytesIO()
    np.save(buffer, np.ones(3, np.float32))
    with zipfile.ZipFile(tmp_path / "s.npz", "w") as archive:
        archive.writestr("../../escaped.npy", buffer.getvalue())

    assert list(read_arrays(tmp_path / "s.npz")) == ["../../escaped"]
    assert [path.name for path in tmp_path.iterdir()] == ["s.npz"]

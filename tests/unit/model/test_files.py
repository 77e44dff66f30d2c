"""What becomes of a file that is no model: each kind has an error of its own."""

from __future__ import annotations

import pytest

from quant_core.errors import ModelError
from quant_core.model import files


def test_a_pointer_of_git_lfs_is_named(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")

    with pytest.raises(ModelError, match="pointer of Git LFS") as caught:
        files.load(path)

    assert "git lfs pull" in caught.value.hint

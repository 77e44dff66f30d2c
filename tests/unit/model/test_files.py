"""What a model takes in a file, and what becomes of one that is no model: each kind has an error of
its own.
"""

from __future__ import annotations

import os

import numpy as np
import onnx_ir as ir
import pytest

from quant_core.errors import ModelError
from quant_core.model import files
from quant_core.model.proto import to_proto
from quant_core.model.session import open_session
from tests.models import save_apart, sketch, tiny_cnn


def test_a_pointer_of_git_lfs_is_named(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")

    with pytest.raises(ModelError, match="pointer of Git LFS") as caught:
        files.load(path)

    assert "git lfs pull" in caught.value.hint


def test_external_data_that_is_a_pointer_of_git_lfs_is_named(tmp_path):
    save_apart(tiny_cnn(), tmp_path / "model.onnx", "weights.bin")
    (tmp_path / "weights.bin").write_bytes(files.LFS_POINTER + b"v1\n")

    with pytest.raises(ModelError, match=r"weights\.bin is a pointer of Git LFS"):
        files.load(tmp_path / "model.onnx")


def test_a_name_that_onnxruntime_cannot_be_told_is_an_error_in_words(tmp_path):
    path = tmp_path / os.fsdecode(b"\xff.onnx")
    path.touch()

    with pytest.raises(ModelError, match="not UTF-8"):
        files.load(path)


@pytest.mark.parametrize("name", ["model.json", "model.textproto", "model"])
@pytest.mark.parametrize("external_data", [None, "weights"])
def test_a_file_that_is_written_is_binary_whatever_its_name(name, external_data, tmp_path):
    path = tmp_path / name

    files.save(files.from_proto(tiny_cnn()), path, external_data)

    assert len(files.load(path).graph) == len(tiny_cnn().graph.node)
    assert open_session(path).get_outputs()


def test_a_path_where_no_model_is_says_what_may_be_meant(tmp_path):
    (tmp_path / "digits.onnx").touch()
    meant = {
        tmp_path / "digit.onnx": "Did you mean digits.onnx?",
        tmp_path / "absent.xyz": "Check the path",
        tmp_path: "Name an .onnx file in it",
        "s3://bucket/model.onnx": "One model is a file of this host; a batch reads from stores",
    }

    for path, hint in meant.items():
        with pytest.raises(ModelError) as caught:
            files.load(path)
        assert caught.value.hint == hint


@pytest.mark.parametrize("columns", [1, 64, 4096])
def test_a_model_takes_as_many_bytes_as_its_message_has(columns):
    weights = {name: np.ones((32, columns), np.float32) for name in "uv"}
    body = "a = MatMul(x, u) b = MatMul(x, v) y = Add(a, b)"
    text = f"(float[n,32] x) => (float[n,{columns}] y) {{ {body} }}"
    model = ir.from_proto(sketch(text, weights))

    assert files.size_in_file(model) == len(to_proto(model).SerializeToString())

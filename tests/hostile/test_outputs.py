"""What a batch writes lies in its output directory, unless the manifest names another path."""

from __future__ import annotations

import pytest

from flows.batch.publish import publish
from flows.manifest.read import check_manifest
from quant_core.errors import RequestError


@pytest.fixture
def models(tmp_path):
    for name in ("in/a.onnx", "in/sub/b.onnx"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def test_models_found_by_a_glob_stay_in_the_output_directory(models):
    batch = {"input_dir": "in/../in/**/*.onnx", "output_dir": "out"}

    outputs = [job.output for job in check_manifest({"batch": batch}, models).jobs]

    assert outputs == [models / "out" / "a_int8.onnx", models / "out" / "sub" / "b_int8.onnx"]


def test_a_link_that_leads_out_is_refused_and_a_path_that_is_named_is_not(models, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (models / "out").mkdir()
    (models / "out" / "sub").symlink_to(elsewhere)
    batch = {"input_dir": "in/**/*.onnx", "output_dir": "out"}

    with pytest.raises(RequestError, match="a link leads out of output_dir"):
        check_manifest({"batch": batch}, models)

    said = {"models": [{"input": "in/a.onnx", "output": str(elsewhere / "a.onnx")}]}
    assert check_manifest(said, models).jobs[0].output == elsewhere / "a.onnx"


def test_a_link_in_an_output_s_place_is_replaced_not_followed(tmp_path):
    (tmp_path / "made").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "made" / "m.onnx").write_bytes(b"model")
    (tmp_path / "precious").write_bytes(b"precious")
    (tmp_path / "out" / "m.onnx").symlink_to(tmp_path / "precious")
    (tmp_path / "out" / ".m.onnx.tmp").symlink_to(tmp_path / "precious")

    publish(tmp_path / "made", {"m.onnx": [5, ""]}, tmp_path / "out" / "m.onnx")

    assert (tmp_path / "precious").read_bytes() == b"precious"
    assert (tmp_path / "out" / "m.onnx").read_bytes() == b"model"

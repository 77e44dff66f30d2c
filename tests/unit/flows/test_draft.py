"""`quantmill init`: a manifest for a folder, with the data that the models take."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from flows.manifest.draft import NAME, draft_manifest
from flows.manifest.read import read_manifest
from quant_core.errors import RequestError
from tests.models import tiny_cnn

SAMPLES = np.zeros((4, 3, 8, 8), np.float32)


@pytest.fixture
def folder(tmp_path):
    for name in ("net", "net_large", "a: b"):
        onnx.save(tiny_cnn(), tmp_path / f"{name}.onnx")
    return tmp_path


def test_data_belong_to_the_model_that_their_name_holds(folder):
    np.save(folder / "net_calibration.npy", SAMPLES)
    (folder / "net_large").mkdir()
    np.savez(folder / "net_large" / "eval.npz", x=SAMPLES)
    np.save(folder / "net_large" / "labels.npy", np.zeros(4, np.int64))

    path, _ = draft_manifest(folder)

    jobs = {job.input.name: job for job in read_manifest(path).jobs}
    assert set(jobs) == {"net.onnx", "net_large.onnx", "a: b.onnx"}
    assert jobs["net.onnx"].calibration.source == str(folder / "net_calibration.npy")
    assert jobs["net.onnx"].evaluation is None
    large = jobs["net_large.onnx"].evaluation
    assert (large.source, large.labels) == (
        str(folder / "net_large" / "eval.npz"),
        str(folder / "net_large" / "labels.npy"),
    )
    assert jobs["a: b.onnx"].calibration is None


@pytest.mark.parametrize("name", ["a", "cal", "e"])
def test_a_name_that_is_part_of_what_data_are_called_hides_none(tmp_path, name):
    onnx.save(tiny_cnn(), tmp_path / f"{name}.onnx")
    for role in ("calibration", "evaluation"):
        np.save(tmp_path / f"{name}_{role}.npy", SAMPLES)

    [job] = read_manifest(draft_manifest(tmp_path)[0]).jobs

    assert job.calibration.source == str(tmp_path / f"{name}_calibration.npy")
    assert job.evaluation.source == str(tmp_path / f"{name}_evaluation.npy")


def test_data_that_do_not_fit_become_a_comment(folder):
    np.save(folder / "net_calibration.npy", SAMPLES[:, :, :5])

    path, models = draft_manifest(folder)

    assert read_manifest(path).jobs[0].calibration is None
    [model] = [model for model in models if model.path.name == "net.onnx"]
    assert [rejected.name for rejected, _ in model.rejected] == ["net_calibration.npy"]
    assert "# net_calibration.npy does not fit: has shape" in path.read_text()


def test_a_manifest_is_never_overwritten(folder):
    (folder / NAME).write_text("mine")

    with pytest.raises(RequestError, match="is there already"):
        draft_manifest(folder)

    assert (folder / NAME).read_text() == "mine"


def test_what_is_no_model_is_left_out_with_the_reason(folder):
    (folder / "broken.onnx").write_bytes(b"no model")

    path, _ = draft_manifest(folder)

    assert "# - input: broken.onnx  # left out: " in path.read_text()
    assert len(read_manifest(path).jobs) == 3


def test_a_folder_without_a_model_is_refused(tmp_path: Path):
    with pytest.raises(RequestError, match="holds no model"):
        draft_manifest(tmp_path)


def test_what_was_made_of_a_model_is_left_out(folder):
    onnx.save(tiny_cnn(), folder / "net_int8.onnx")
    onnx.save(tiny_cnn(), folder / "other_int8.onnx")  # of no model here

    path, _ = draft_manifest(folder)

    assert "net_int8.onnx" not in {job.input.name for job in read_manifest(path).jobs}
    assert "other_int8.onnx" in {job.input.name for job in read_manifest(path).jobs}
    assert "- input: net_int8.onnx  # left out: made of net.onnx, by its name" in path.read_text()


def test_a_folder_of_hugging_face_is_pointed_out(folder):
    (folder / "config.json").write_text("{}")

    path, _ = draft_manifest(folder)

    assert "--layout huggingface" in path.read_text().splitlines()[0]
    assert len(read_manifest(path).jobs) == 3

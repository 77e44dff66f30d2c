"""A quantized model to look at."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

from flows.cli.commands import main
from tests.models import tiny_cnn


@pytest.fixture(scope="session")
def quantized_once(tmp_path_factory) -> tuple[Path, str]:
    """The folder of `quantized`, and what quantizing answered; each test gets a copy."""
    folder = tmp_path_factory.mktemp("quantized")
    samples = np.random.default_rng(3).standard_normal((32, 3, 8, 8), dtype=np.float32)
    onnx.save(tiny_cnn(), folder / "float.onnx")
    np.save(folder / "samples.npy", samples)
    line = "quantize float.onnx -o int8.onnx --mode static --data samples.npy --format json"
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()) as answer:
        assert main(line.split()) == 0
    return folder, answer.getvalue()


@pytest.fixture
def quantized(quantized_once, tmp_path, monkeypatch):
    """A folder with float.onnx, int8.onnx and samples.npy; what quantizing answered."""
    folder, answer = quantized_once
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return json.loads(answer)

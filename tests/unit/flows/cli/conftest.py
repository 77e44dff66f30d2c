"""A quantized model to look at."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest

from flows.cli.commands import main
from tests.models import tiny_cnn


@pytest.fixture
def quantized(tmp_path, monkeypatch, capsys):
    """A folder with float.onnx, int8.onnx and samples.npy; what quantizing answered."""
    monkeypatch.chdir(tmp_path)
    onnx.save(tiny_cnn(), "float.onnx")
    np.save(
        "samples.npy", np.random.default_rng(3).standard_normal((32, 3, 8, 8), dtype=np.float32)
    )
    line = "quantize float.onnx -o int8.onnx --mode static --data samples.npy --format json"
    assert main(line.split()) == 0
    return json.loads(capsys.readouterr().out)

"""deployments/ci/gate.yaml: its command passes a model that keeps its contract, and no other."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import yaml

from quant_core import api
from tests.models import tiny_cnn
from tests.pipeline.services import ROOT


@pytest.mark.slow
def test_a_pull_request_passes_only_with_a_model_that_keeps_its_contract(tmp_path):
    recipe = yaml.safe_load((ROOT / "deployments" / "ci" / "gate.yaml").read_text())
    steps = {step["name"]: step["run"] for step in recipe["jobs"]["accuracy"]["steps"][2:]}
    for folder in ("models", "quantized", "data"):
        (tmp_path / folder).mkdir()
    original, quantized = tmp_path / "models/net.onnx", tmp_path / "quantized/net_int8.onnx"
    onnx.save(tiny_cnn(), original)
    x = np.random.default_rng(0).standard_normal((256, 3, 8, 8), dtype=np.float32)
    (y,) = ort.InferenceSession(original).run(None, {"x": x})
    np.savez(tmp_path / "data/test.npz", x=x)
    np.save(tmp_path / "data/labels.npy", y.argmax(1))
    api.quantize_model(original, quantized, calibration=tmp_path / "data/test.npz")

    def gate() -> int:
        """The exit code of the step, run as Actions runs it."""
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        command = ["bash", "-e", "-c", steps["gate"]]
        environment = {**os.environ, "PATH": path}
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, check=False
        ).returncode

    assert gate() == 0
    onnx.save(tiny_cnn(seed=1), quantized)
    assert gate() == 1
    assert steps["install"] == "pip install tools/quantmill-*.whl"

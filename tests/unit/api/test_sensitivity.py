"""What only reports costs no result: a model is made and compared where its parts do not run."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

import quant_core
from quant_core.errors import ModelError
from tests.models import sketch
from tests.oracle.cases import weights


@pytest.fixture
def without_parts(monkeypatch):
    def fail(*_, **__):
        raise ModelError("a part does not load")

    monkeypatch.setattr("quant_core.evaluate.node_noise.PartwiseRunner", fail)


def test_a_model_whose_parts_do_not_run_is_quantized_and_compared(tmp_path, without_parts):
    text = "(float[n,32] x) => (float[n,8] y) { a = MatMul(x, u) r = Relu(a) y = MatMul(r, v) }"
    onnx.save(sketch(text, weights(u=(32, 32), v=(32, 8))), tmp_path / "m.onnx")
    samples = np.random.default_rng(0).standard_normal((8, 32), np.float32)
    config = quant_core.QuantConfig(mode="dynamic")

    made = quant_core.quantize_model(
        tmp_path / "m.onnx", tmp_path / "q.onnx", config, calibration=samples
    )
    found = quant_core.validate_model(
        tmp_path / "m.onnx", tmp_path / "q.onnx", samples, detailed=True
    )

    assert min(made.worst_db, found.fidelity.sound_db) > 20
    assert "a part does not load" in found.fidelity.note

"""Of a model that is quantized in part, only the float rest is worked on."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from quant_core.api import quantize, quantize_model
from quant_core.config import QuantConfig
from quant_core.errors import ModelError
from tests.models import sketch

RNG = np.random.default_rng(0)
SCALE, ZERO = np.array(0.02, np.float32), np.array(128, np.uint8)
QUANTIZED = {
    "w8": RNG.integers(-127, 128, (16, 16), np.int8),
    "s": np.full(16, 0.01, np.float32),
    "z": np.zeros(16, np.int8),
    "xs": SCALE,
    "xz": ZERO,
}
PAIRS = """q = QuantizeLinear(x, xs, xz) d = DequantizeLinear(q, xs, xz)
    w = DequantizeLinear<axis = 1>(w8, s, z) h = MatMul(d, w)"""


def saved(path, text, weights) -> onnx.ModelProto:
    model = sketch(text, weights)
    onnx.save(model, path)
    return model


def half_done(path) -> onnx.ModelProto:
    """The first product is quantized, the second, larger one is not."""
    big = RNG.normal(size=(16, 512)).astype(np.float32)
    text = f"(float[n, 16] x) => (float[n, 512] y) {{ {PAIRS} y = MatMul(h, big) }}"
    return saved(path, text, QUANTIZED | {"big": big})


@pytest.mark.parametrize("mode", ["auto", "weight_only", "dynamic", "static"])
def test_the_float_weights_are_quantized_and_the_integers_stay(tmp_path, mode):
    half_done(tmp_path / "m.onnx")
    x = RNG.normal(size=(24, 16)).astype(np.float32)

    result = quantize_model(
        tmp_path / "m.onnx", tmp_path / "q.onnx", QuantConfig(mode=mode), calibration={"x": x}
    )

    written = onnx.load(tmp_path / "q.onnx")
    kept = {t.name: onnx.numpy_helper.to_array(t) for t in written.graph.initializer}
    assert any(np.array_equal(array, QUANTIZED["w8"]) for array in kept.values())
    assert result.size_bytes < 0.5 * result.float_size_bytes
    a, b = (
        ort.InferenceSession(tmp_path / name).run(None, {"x": x})[0]
        for name in ("m.onnx", "q.onnx")
    )
    assert np.abs(a - b).max() < 0.05 * np.abs(a).max()


def test_a_model_without_float_weights_is_quantized_already(tmp_path):
    saved(
        tmp_path / "m.onnx",
        f"(float[n, 16] x) => (float[n, 16] h) {{ {PAIRS} }}",
        QUANTIZED,
    )

    with pytest.raises(ModelError, match="quantized already"):
        quantize(tmp_path / "m.onnx", tmp_path / "q.onnx")

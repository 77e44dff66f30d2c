"""Models whose nodes choose rows: some are chosen by no sample, and rounding may choose others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from quant_core.api import quantize_model
from quant_core.config import QuantConfig
from quant_core.errors import ModelError
from quant_core.model.session import open_session
from tests.models import sketch
from tests.oracle.cases import weights

# The expert gets the rows whose first value is above `least`.
TEXT = """(float[n,32] x) => (float[n,8] y, float[m,128] z) {
    a = MatMul(x, w) y = MatMul(a, u) c = Gather<axis = 1>(a, k) g = Greater(c, least)
    i = NonZero(g) t = Gather(i, k) r = Squeeze(t, k) b = Gather(a, r) z = MatMul(b, v)
}"""
SAMPLES = [
    {"x": np.random.default_rng(seed).standard_normal((16, 32), np.float32)} for seed in range(8)
]


def saved(folder: Path, least: float) -> Path:
    arrays = weights(w=(32, 64), u=(64, 8), v=(64, 128))
    arrays |= {"least": np.float32(least), "k": np.array([0])}
    onnx.save(sketch(TEXT, arrays), folder / "float.onnx")
    return folder / "float.onnx"


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("least", [0.0, 1e6])
def test_an_expert_may_get_other_rows_or_none(tmp_path, bits, least):
    path, output = saved(tmp_path, least), tmp_path / "quantized.onnx"

    quantize_model(path, output, QuantConfig(bits=bits), calibration=SAMPLES)

    expected, found = (open_session(p).run(None, SAMPLES[0])[0] for p in (path, output))
    assert np.abs(found - expected).max() < 0.3 * np.abs(expected).max()


def test_a_static_expert_needs_rows(tmp_path):
    path = saved(tmp_path, 1e6)

    with pytest.raises(ModelError, match="saw no value of this tensor"):
        quantize_model(path, tmp_path / "q.onnx", QuantConfig(mode="static"), calibration=SAMPLES)

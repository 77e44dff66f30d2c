"""Models of quantization-aware training: learned scales stay, and fuse; or they are replaced."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper

from quant_core.api import quantize_model
from quant_core.config import QuantConfig
from quant_core.model.session import optimized_graph
from tests.models import sketch

SCALES = {"x": 0.03, "r": 0.05, "p": 0.04}


def _pair(name: str, scale: str, zero: str, axis: int | None = None) -> str:
    of = "" if axis is None else f"<axis = {axis}>"
    return f"""{name}_q = QuantizeLinear{of}({name}, {scale}, {zero})
        {name}_d = DequantizeLinear{of}({name}_q, {scale}, {zero})"""


def trained() -> onnx.ModelProto:
    """Conv, Relu, pool and MatMul as exporters write them: symmetric int8, float weights."""
    rng = np.random.default_rng(0)
    w = (rng.normal(size=(16, 3, 3, 3)) / 5).astype(np.float32)
    g = (rng.normal(size=(16, 10)) / 4).astype(np.float32)
    constants = {
        "w": w,
        "g": g,
        "b": rng.normal(size=16).astype(np.float32),
        "ws": np.abs(w).max((1, 2, 3)) / np.float32(127),
        "gs": np.abs(g).max(0) / np.float32(127),
        "wz": np.zeros(16, np.int8),
        "gz": np.zeros(10, np.int8),
        "z": np.zeros((), np.int8),
    } | {f"{name}s": np.array(scale, np.float32) for name, scale in SCALES.items()}
    text = f"""(float[n, 3, 12, 12] x) => (float[n, 10] y) {{
        {_pair("x", "xs", "z")} {_pair("w", "ws", "wz", 0)}
        c = Conv<pads = [1, 1, 1, 1]>(x_d, w_d, b) r = Relu(c) {_pair("r", "rs", "z")}
        p = GlobalAveragePool(r_d) {_pair("p", "ps", "z")} f = Flatten(p_d)
        {_pair("g", "gs", "gz", 1)} y = MatMul(f, g_d)
    }}"""
    return sketch(text, constants)


def images(count: int) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(count, 3, 12, 12)).astype(np.float32)


def outputs(path, x) -> np.ndarray:
    return ort.InferenceSession(path).run(None, {"x": x})[0]


@pytest.mark.parametrize("with_samples", [False, True])
@pytest.mark.parametrize("target", ["x86", "arm64", "portable"])
def test_learned_scales_are_respected(tmp_path, target, with_samples):
    onnx.save(trained(), tmp_path / "m.onnx")
    samples = {"x": images(8)} if with_samples else None

    result = quantize_model(
        tmp_path / "m.onnx", tmp_path / "q.onnx", QuantConfig(target=target), calibration=samples
    )

    written = onnx.load(tmp_path / "q.onnx")
    numbers = [numpy_helper.to_array(t) for t in written.graph.initializer]
    scales = {float(a) for a in numbers if a.dtype == np.float32 and a.size == 1}
    assert {np.float32(scale) for scale in SCALES.values()} <= {np.float32(s) for s in scales}
    assert not any(a.dtype == np.float32 and a.ndim >= 2 for a in numbers)
    assert result.size_bytes < result.float_size_bytes
    a, b = outputs(tmp_path / "m.onnx", images(4)), outputs(tmp_path / "q.onnx", images(4))
    assert np.abs(a - b).max() <= 0.02 * np.abs(a).max()


def test_pairs_fuse_on_x86_also_behind_a_relu(tmp_path):
    onnx.save(trained(), tmp_path / "m.onnx")

    quantize_model(tmp_path / "m.onnx", tmp_path / "q.onnx", QuantConfig(target="x86"))

    kernels = [node.op_type for node in optimized_graph(tmp_path / "q.onnx").graph.node]
    assert "QLinearConv" in kernels
    assert "QLinearConv" not in [n.op_type for n in optimized_graph(tmp_path / "m.onnx").graph.node]


def test_the_last_gemm_fuses_with_its_bias(tmp_path):
    rng = np.random.default_rng(0)
    constants = {
        "w": rng.normal(size=(16, 10)).astype(np.float32),
        "b": rng.normal(size=10).astype(np.float32),
        "xs": np.array(0.03, np.float32),
        "ws": np.full(10, 0.03, np.float32),
        "z": np.zeros((), np.int8),
        "wz": np.zeros(10, np.int8),
    }
    text = f"""(float[n, 16] x) => (float[n, 10] y) {{
        {_pair("x", "xs", "z")} {_pair("w", "ws", "wz", 1)} y = Gemm(x_d, w_d, b) }}"""
    onnx.save(sketch(text, constants), tmp_path / "m.onnx")

    quantize_model(tmp_path / "m.onnx", tmp_path / "q.onnx", QuantConfig(target="x86"))

    assert "QGemm" in [n.op_type for n in optimized_graph(tmp_path / "q.onnx").graph.node]
    x = rng.normal(size=(4, 16)).astype(np.float32)
    half_a_step = 0.03 * 0.03 / 2  # of the bias
    difference = outputs(tmp_path / "m.onnx", x) - outputs(tmp_path / "q.onnx", x)
    assert np.abs(difference).max() <= half_a_step + 1e-5


def test_learned_scales_are_replaced_if_asked_for(tmp_path):
    onnx.save(trained(), tmp_path / "m.onnx")

    result = quantize_model(
        tmp_path / "m.onnx",
        tmp_path / "q.onnx",
        QuantConfig(qat="replace", mode="static"),
        calibration={"x": images(8)},
    )

    assert [node.op_type for node in result.plan.nodes if node.weights] == ["Conv", "MatMul"]
    a, b = outputs(tmp_path / "m.onnx", images(4)), outputs(tmp_path / "q.onnx", images(4))
    assert np.abs(a - b).max() <= 0.1 * np.abs(a).max()

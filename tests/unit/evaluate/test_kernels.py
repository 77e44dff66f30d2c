"""`explain` says of every kernel what it computes with, and why not in integers."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from quant_core import api, judging
from quant_core.config import QuantConfig
from quant_core.evaluate.float_reasons import NOT_QUANTIZED
from quant_core.evaluate.kernels import Arithmetic, profile_kernels
from tests.models import sketch, tiny_cnn

CONSTANTS = {
    "s": np.float32(0.02),
    "z": np.uint8(128),
    "z0": np.uint8(0),  # so that integers hold nothing below 0, as Relu wants
    "zw": np.int8(0),
    "wf": np.ones((3, 4), np.float32),
    "k": np.ones((4, 3, 3, 3), np.int8),
}
QDQ = "q = QuantizeLinear(x, s, z) a = DequantizeLinear(q, s, z)"
IMAGE = "(float[1,3,8,8] x) => (float[1,4,6,6] y)"
ROWS = "(float[n,3] x) => (float[n,4] y)"


def kernels_of(tmp_path, text, feed):
    onnx.save(sketch(text, CONSTANTS), tmp_path / "model.onnx")
    return profile_kernels(tmp_path / "model.onnx", {"x": feed}, seconds=0)


def the_multiplication(kernels):
    [kernel] = [k for k in kernels if "Conv" in k.op_type or "MatMul" in k.op_type]
    return kernel


@pytest.mark.parametrize(
    ("text", "shape", "why"),
    [
        (f"{ROWS} {{ y = MatMul(x, wf) }}", (2, 3), NOT_QUANTIZED),
        (f"{ROWS} {{ {QDQ} y = MatMul(a, wf) }}", (2, 3), "its weight is in float"),
        (
            f"{IMAGE} {{ d = DequantizeLinear(k, s, zw) y = Conv(x, d) }}",
            (1, 3, 8, 8),
            "only its weight is quantized; it is unpacked when the model loads",
        ),
        (
            f"{IMAGE} {{ f = Cast<to = 1>(k) d = Mul(f, s) y = Conv(x, d) }}",
            (1, 3, 8, 8),
            "only its weight is quantized; it is unpacked when the model loads",
        ),
        (
            f"{IMAGE} {{ {QDQ} d = DequantizeLinear(k, s, zw) y = Conv(a, d) }}",
            (1, 3, 8, 8),
            "its output is not quantized, which its integer kernel needs",
        ),
    ],
)
def test_why_a_kernel_is_in_float(tmp_path, text, shape, why):
    kernel = the_multiplication(kernels_of(tmp_path, text, np.ones(shape, np.float32)))

    assert (kernel.arithmetic, kernel.why) == (Arithmetic.FLOAT32, why)


@pytest.mark.parametrize(
    ("nodes", "op_type", "why"),
    [
        (f"{QDQ} y = Softmax(a)", "Softmax", "no faster integer kernel for Softmax is known"),
        (f"{QDQ} y = Add(a, x)", "Add", "some of its inputs are computed in float"),
        (f"{QDQ} b = Erf(a) y = Mul(b, x)", "Mul", "its input is computed in float"),
        (
            f"{QDQ} y = Sigmoid(a)",
            "Sigmoid",
            "its output is not quantized, which its integer kernel needs",
        ),
        ("y = Sigmoid(x)", "Sigmoid", NOT_QUANTIZED),
    ],
)
def test_why_a_kernel_without_a_weight_is_in_float(tmp_path, nodes, op_type, why):
    text = f"(float[2,3] x) => (float[2,3] y) {{ {nodes} }}"

    kernels = kernels_of(tmp_path, text, np.ones((2, 3), np.float32))

    [found] = [(k.arithmetic, k.has_weight, k.why) for k in kernels if k.op_type == op_type]
    assert found == (Arithmetic.FLOAT32, False, why)


def test_a_kernel_in_integers_covers_the_node_that_it_stands_for(tmp_path):
    text = f"{IMAGE} {{ {QDQ} d = DequantizeLinear(k, s, zw) c = Conv(a, d) r = Relu(c)"
    text += " p = QuantizeLinear(r, s, z0) y = DequantizeLinear(p, s, z0) }"

    kernel = the_multiplication(kernels_of(tmp_path, text, np.ones((1, 3, 8, 8), np.float32)))

    assert (kernel.op_type, kernel.arithmetic) == ("QLinearConv", Arithmetic.INT8)
    assert "c" in kernel.covers
    assert kernel.ms > 0


@pytest.mark.parametrize("activation", [(), ("r",)])
def test_a_kernel_that_adds_to_its_product_covers_the_sum(tmp_path, activation):
    text = f"""(float[1,16,8,8] x) => (float[1,16,8,8] y) {{
        a = Conv(x, w) b = Conv(a, w) s = Add(b, a) r = {"Relu" if activation else "Identity"}(s)
        y = Conv(r, w)
    }}"""
    weights = {"w": np.ones((16, 16, 1, 1), np.float32)}
    onnx.save(sketch(text, weights), tmp_path / "model.onnx")
    feed = {"x": np.ones((1, 16, 8, 8), np.float32)}

    kernels = profile_kernels(tmp_path / "model.onnx", feed, seconds=0)

    covered = [k.covers for k in kernels if k.op_type == "Conv"]
    assert covered == [("a",), ("b", "s", *activation), ("y",)]


@pytest.fixture
def cnn(tmp_path):
    onnx.save(tiny_cnn(), tmp_path / "float.onnx")
    return tmp_path / "float.onnx"


def test_a_float_model_is_told_what_a_plan_would_do(cnn):
    explanation = judging.explain_model(cnn, QuantConfig(mode="weight_only"), seconds=0).to_dict()

    advice = {name: k["advice"] for k in explanation["kernels"] for name in k["covers"]}
    assert advice["conv"].startswith("compute in float, weight in int8")
    assert not explanation["is_quantized"]
    assert sum(explanation["shares"].values()) == pytest.approx(1)


def test_a_model_whose_weights_are_all_unpacked_is_quantized(cnn, tmp_path):
    api.quantize_model(cnn, tmp_path / "int8.onnx", QuantConfig(mode="weight_only"))

    explanation = judging.explain_model(tmp_path / "int8.onnx", seconds=0)

    assert explanation.is_quantized


def test_a_quantized_model_is_told_where_it_saturates(cnn, tmp_path):
    samples = np.random.default_rng(0).standard_normal((8, 3, 8, 8), dtype=np.float32)
    config = QuantConfig(mode="static", target="x86-vnni", weight_method="rtn")
    api.quantize_model(cnn, tmp_path / "int8.onnx", config, calibration=samples)

    explanation = judging.explain_model(tmp_path / "int8.onnx", seconds=0)

    unsafe = judging.validate_model(cnn, tmp_path / "int8.onnx").saturation
    found = sum(row.saturating_pairs for row in explanation.kernels)
    assert found == sum(node["pairs"] for node in unsafe) > 0
    assert not any(row.advice for row in explanation.kernels)

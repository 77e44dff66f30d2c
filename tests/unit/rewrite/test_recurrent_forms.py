"""Recurrent nodes that leave outputs out, or compute a weight, are quantized as others are."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from quant_core.api import quantize_model
from quant_core.config import QuantConfig
from tests.models import sketch

HIDDEN, SIZE = 32, 24
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


def weights(operator: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    rows = GATES[operator] * HIDDEN
    shapes = {"w": (1, rows, SIZE), "r": (1, rows, HIDDEN)}
    return {name: (rng.normal(size=s) / 6).astype(np.float32) for name, s in shapes.items()}


def check(path, model: onnx.ModelProto, **options) -> None:
    """Quantize with samples, and compare."""
    onnx.save(model, path / "m.onnx")
    x = np.random.default_rng(1).normal(size=(8, 9, 1, SIZE)).astype(np.float32)

    quantize_model(
        path / "m.onnx", path / "q.onnx", QuantConfig(**options), calibration=[{"x": a} for a in x]
    )

    a, b = (ort.InferenceSession(path / n).run(None, {"x": x[0]}) for n in ("m.onnx", "q.onnx"))
    for expected, got in zip(a, b, strict=True):
        assert np.abs(got - expected).max() < 0.05 * np.abs(expected).max()


@pytest.mark.parametrize("operator", GATES)
@pytest.mark.parametrize("mode", ["dynamic", "weight_only"])
def test_the_first_output_may_be_left_out(tmp_path, operator, mode):
    text = f"""(float[9, 1, {SIZE}] x) => (float[1, 1, {HIDDEN}] last)
        {{ none, last = {operator}<hidden_size = {HIDDEN}>(x, w, r) }}"""
    model = sketch(text, weights(operator))
    model.graph.node[0].output[0] = ""

    check(tmp_path, model, mode=mode)


@pytest.mark.parametrize("operator", GATES)
@pytest.mark.parametrize("computed", ["w", "r"])
def test_one_weight_may_be_computed(tmp_path, operator, computed):
    inputs = {"w": "w", "r": "r"} | {computed: "scaled"}
    text = f"""(float[9, 1, {SIZE}] x) => (float[9, 1, 1, {HIDDEN}] y)
        {{ top = ReduceMax<keepdims = 0>(x) scaled = Mul({computed}, top)
           y = {operator}<hidden_size = {HIDDEN}>(x, {inputs["w"]}, {inputs["r"]}) }}"""

    check(tmp_path, sketch(text, weights(operator)), mode="dynamic")


def test_an_lstm_in_a_branch_may_leave_outputs_out(tmp_path):
    lstm = f"LSTM<hidden_size = {HIDDEN}>(x, w, r)"
    text = f"""(float[9, 1, {SIZE}] x) => (float[1, 1, {HIDDEN}] y) {{
        sum = ReduceSum<keepdims = 0>(x)
        c = Greater(sum, zero)
        y = If(c) <then_branch = t () => (float[1, 1, {HIDDEN}] h) {{ a, h = {lstm} }},
                   else_branch = e () => (float[1, 1, {HIDDEN}] k) {{ b, k = {lstm} }}>
    }}"""
    model = sketch(text, weights("LSTM") | {"zero": np.zeros((), np.float32)})
    for attribute in model.graph.node[-1].attribute:
        attribute.g.node[0].output[0] = ""

    check(tmp_path, model)

"""Inputs that the graph itself brings to mean 0 and deviation 1 are drawn in their own units."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper

from quant_core.api import quantize
from quant_core.data.inputs import input_specs
from quant_core.data.samples import open_samples
from quant_core.data.spec import SampleSpec
from tests.models import sketch

MEANS = np.float32([50, 1e5, 0.5, -3, 1e3, 7, 0, 1e-3])
DEVIATIONS = np.float32([10, 3e4, 0.02, 2, 4e2, 1, 5, 2e-4])
CONSTANTS = {
    "mean": MEANS,
    "negative": -MEANS,
    "deviation": DEVIATIONS,
    "inverse": 1 / DEVIATIONS,
    "shift": -MEANS / DEVIATIONS,
    "variance": np.square(DEVIATIONS),
    "one": np.ones(8, np.float32),
    "zero": np.zeros(8, np.float32),
    "places": np.ones((1, 4, 8), np.float32),
}


def scaler() -> onnx.ModelProto:
    model = sketch("(float[n, 8] x) => (float[n, 8] y) { y = ai.onnx.ml.Scaler(x) }", CONSTANTS)
    numbers = {"offset": MEANS.tolist(), "scale": (1 / DEVIATIONS).tolist()}
    model.graph.node[0].attribute.extend(map(helper.make_attribute, numbers, numbers.values()))
    return model


def of_body(body: str, shape: str = "n, 8") -> onnx.ModelProto:
    return sketch(f"(float[{shape}] x) => (float y) {{ {body} }}", CONSTANTS)


def drawn(path, model: onnx.ModelProto) -> np.ndarray:
    """All samples of x, side by side."""
    onnx.save(model, path / "m.onnx")
    spec = SampleSpec(count=400)
    samples = open_samples(spec, input_specs(path / "m.onnx"), path / "m.onnx")
    return np.concatenate([feed["x"] for feed in samples])


@pytest.mark.parametrize(
    "model",
    [
        of_body("d = Sub(x, mean) y = Div(d, deviation)"),
        of_body("d = Add(negative, x) y = Mul(inverse, d)"),
        of_body("d = Mul(x, inverse) y = Add(d, shift)"),
        of_body("y = BatchNormalization <epsilon = 0.0> (x, one, zero, mean, variance)"),
        scaler(),
    ],
)
def test_what_the_graph_standardizes_is_drawn_in_its_units(tmp_path, model):
    x = drawn(tmp_path, model)

    z = (x - MEANS) / DEVIATIONS
    # a field has a level of its own: of each of 400 samples mean and deviation are normal
    assert np.abs(z.mean(0)).max() < 5 * np.sqrt(2 / 400)
    assert 0.5 < z.std(0).min() <= z.std(0).max() < 2


def test_units_lie_along_the_axis_of_channels(tmp_path):
    model = of_body("y = BatchNormalization(x, one, zero, mean, variance)", "n, 8, 30")

    x = drawn(tmp_path, model)

    assert np.abs(x.mean((0, 2)) - MEANS).max() < 1e5
    assert np.argmax(np.abs(x.mean((0, 2)))) == 1


@pytest.mark.parametrize(
    "body",
    [
        "d = Sub(x, mean) y = Relu(d)",  # shifted only: it may be a bias
        "d = Add(x, places) e = Mul(d, places) y = Neg(e)",  # what each place adds
        "d = Sub(x, mean) z = Div(d, deviation) y = MatMul(x, z)",  # others read it as it is
    ],
)
def test_other_arithmetic_is_no_unit(tmp_path, body):
    shape = "n, 8, 8" if "MatMul" in body else "n, 4, 8"

    x = drawn(tmp_path, of_body(body, shape))

    assert np.abs(x).max() < 100


@pytest.mark.parametrize("is_folded", [False, True])
def test_standardization_does_not_spoil_a_file_without_data(tmp_path, is_folded):
    """Divided by deviations from 2e-4 to 3e4, rows of one scale are lost beside each other.

    is_folded  into the first weight and its bias
    """
    rng = np.random.default_rng(0)
    means, deviations = np.tile(MEANS, 4), np.tile(DEVIATIONS, 4)
    shapes = {"u": (32, 64), "b": (64,), "v": (64, 64), "w": (64, 8)}
    constants = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    first = "d = Sub(x, mean) z = Div(d, deviation) f = Gemm(z, u, b)"
    if is_folded:
        first = "f = Gemm(x, u, b)"
        constants["b"] -= (means / deviations) @ constants["u"]
        constants["u"] /= deviations[:, None]
    else:
        constants |= {"mean": means, "deviation": deviations}
    text = f"""(float[n, 32] x) => (float[n, 8] y) {{ {first}
        r = Relu(f) c = MatMul(r, v) e = Relu(c) y = MatMul(e, w) }}"""
    original, made = tmp_path / "m.onnx", tmp_path / "q.onnx"
    onnx.save(sketch(text, {name: c.astype(np.float32) for name, c in constants.items()}), original)
    x = (means + deviations * rng.normal(size=(64, 32))).astype(np.float32)

    quantize(original, made)

    expected, got = (ort.InferenceSession(file).run(None, {"x": x})[0] for file in (original, made))
    noise = np.square(got - expected).mean()
    assert 10 * np.log10(expected.var() / noise) > 20


def test_an_input_in_units_beyond_its_type_stays_finite(tmp_path):
    text = """(float16[n, 8] x) => (float[n, 8] y)
        { d = Mul(x, small) h = Add(d, small) y = Cast<to = 1>(h) }"""

    x = drawn(tmp_path, sketch(text, {"small": np.full(8, 1e-6, np.float16)}))

    assert np.isfinite(x).all()

"""Inputs whose first weights hold what standardizes them are drawn in their own units."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from quant_core.data.weight_units import weighted_units
from tests.models import sketch

MEANS = np.array([50, 1e5, 0.5, -3, 1e3, 7, 0, 1e-3])
DEVIATIONS = np.array([10, 3e4, 0.02, 2, 4e2, 1, 5, 2e-4])
ROWS = np.random.default_rng(0).normal(size=(8, 64)) / np.sqrt(8)
WEIGHT = ROWS / DEVIATIONS[:, None]
BIAS = -(MEANS / DEVIATIONS) @ ROWS
CONSTANTS = {
    "w": WEIGHT,
    "columns": WEIGHT.T,
    "alike": ROWS,
    "b": BIAS,
    "kernel": np.stack([WEIGHT.T / 3] * 3, axis=2),
    "gates": WEIGHT.T[None],
    "states": np.zeros((1, 64, 16)),
    "both": np.concatenate([BIAS, np.zeros(64)])[None],
}


def units_of(body: str, shape: str, dtype: str = "float"):
    constants = {name: array.astype(np.float32) for name, array in CONSTANTS.items()}
    model = sketch(f"({dtype}[{shape}] x) => (float y) {{ {body} }}", constants)
    return weighted_units(ir.from_proto(model).graph.inputs[0])


@pytest.mark.parametrize(
    "body",
    [
        "y = Gemm(x, w, b)",
        "y = Gemm <transB = 1> (x, columns, b)",
        "h = MatMul(x, w) y = Add(b, h)",
        "y, h, c = LSTM <hidden_size = 16> (x, gates, states, both)",
        "y = Conv(x, kernel, b)",
    ],
)
def test_units_are_told_by_a_weight_and_its_bias(body):
    shape, axis = ("n, 8, 20", -2) if "Conv" in body else ("n, 8", -1)
    if "LSTM" in body:
        shape = "20, n, 8"

    units = units_of(body, shape)

    assert units is not None
    assert units.axis == axis
    ratios = np.array(units.deviations) / DEVIATIONS
    assert 0.5 < ratios.min() <= ratios.max() < 2
    assert np.abs((np.array(units.means) - MEANS) / DEVIATIONS).max() < 0.1


def test_without_a_bias_means_are_0():
    units = units_of("y = MatMul(x, w)", "n, 8")

    assert units is not None
    assert not any(units.means)


def test_units_are_told_through_a_cast():
    assert units_of("h = Cast <to = 1> (x) y = Gemm(h, w, b)", "n, 8", "double") is not None


@pytest.mark.parametrize(
    "body",
    [
        "y = Gemm(x, alike, b)",
        "h = Gemm(x, w, b) g = Gemm(x, alike) y = Add(h, g)",  # two read it
        "h = Relu(x) y = Gemm(h, w, b)",
    ],
)
def test_other_weights_tell_no_units(body):
    assert units_of(body, "n, 8") is None


@pytest.mark.parametrize("weight", [np.zeros((8, 4)), np.zeros((0, 4)), WEIGHT[None]])
def test_weights_of_zeros_and_stacks_tell_no_units(weight):
    model = sketch("(float[n, 8] x) => (float y) { y = MatMul(x, w) }", {"w": np.float32(weight)})

    assert weighted_units(ir.from_proto(model).graph.inputs[0]) is None


def test_kernels_that_add_up_to_0_tell_deviations():
    kernel = np.float32(np.stack([WEIGHT.T, -WEIGHT.T], axis=2))
    model = sketch("(float[n, 8, 20] x) => (float y) { y = Conv(x, w) }", {"w": kernel})

    units = weighted_units(ir.from_proto(model).graph.inputs[0])

    assert units is not None
    assert not any(units.means)
    assert max(units.deviations) > 1e6 * min(units.deviations)

"""Activations that exporters spell out become what onnxruntime computes at once."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from quant_core.model.session import optimized_graph
from quant_core.optimize.run import Optimized
from tests.unit.optimize.checked import optimized

RNG = np.random.default_rng(6)
NUMBERS = {
    "zero": 0, "half": 0.5, "one": 1, "two": 2, "three": 3, "six": 6, "sixth": 1 / 6,
    "root": 2**0.5, "turned": 0.5**0.5,
}  # fmt: skip


def numbers_in(body: str) -> dict[str, np.ndarray]:
    used = (n for n in NUMBERS if f"{n})" in body or f"{n}," in body)
    return {n: np.array(NUMBERS[n], np.float32) for n in used}


def kernels_of(found: Optimized) -> list[str]:
    model = ir.to_proto(found.model).SerializeToString()
    return [n.op_type for n in optimized_graph(model).graph.node]


def operators(body: str, shape: str = "n, 4, 5, 5") -> list[str]:
    """What becomes of an activation between two Convs, or alone where the body has none."""
    constants = numbers_in(body)
    for name in ("w", "v"):
        if f" {name})" in body:
            constants[name] = RNG.standard_normal((4, 4, 1, 1)).astype(np.float32)
    return optimized(f"(float[{shape}] x) => (float[{shape}] y) {{ {body} }}", constants)[1]


@pytest.mark.parametrize(
    ("body", "left"),
    [
        ("y = Max(x, zero)", ["Relu"]),
        ("y = Max(zero, x)", ["Relu"]),
        ("a = Max(x, zero) y = Min(a, six)", ["Clip"]),
        ("a = Relu(x) y = Min(six, a)", ["Clip"]),
        ("a = Clip(x, zero, six) y = Clip(a, one, three)", ["Clip"]),
        ("a = Min(x, six) b = Relu(a) y = Max(b, zero)", ["Clip"]),
        ("a = Min(x, zero) y = Max(a, one)", ["Clip"]),
        ("y = Clip(x, zero, six)", ["Clip"]),
        ("a = Neg(x) y = Max(a, x)", ["Neg", "Max"]),
        ("a = Max(x, zero) b = Min(a, six) y = Add(a, b)", ["Relu", "Clip", "Add"]),
    ],
)
def test_bounds_in_a_row_are_one(body, left):
    assert operators(body) == left


@pytest.mark.parametrize(
    "gate",
    [
        "a = Add(c, three) r = Clip(a, zero, six) m = Mul(c, sixth) h = Mul(m, r)",
        "a = Mul(c, sixth) b = Add(a, half) r = Clip(b, zero, one) h = Mul(c, r)",
        "a = Add(three, c) b = Max(a, zero) r = Min(b, six) m = Mul(r, c) h = Div(m, six)",
        "a = Add(c, three) b = Relu(a) r = Min(b, six) m = Mul(c, r) h = Mul(m, sixth)",
    ],
)
def test_a_hard_swish_has_two_operators_however_it_is_spelled(gate):
    left = operators(f"c = Conv(x, w) {gate} y = Conv(h, v)")

    assert left == ["Conv", "HardSigmoid", "Mul", "Conv"]


@pytest.mark.parametrize(
    "body",
    [
        "a = Sub(two, x) y = Clip(a, zero, one)",  # it falls
        "a = Add(x, half) y = Clip(a, zero, six)",  # a Mul would stay
        "a = Add(x, half) y = Clip(a, half, one)",
    ],
)
def test_clipped_sums_that_are_no_hard_sigmoid_stay(body):
    assert "HardSigmoid" not in operators(body)


@pytest.mark.parametrize(
    ("body", "left"),
    [
        ("a = Mul(x, sixth) y = Max(a, x)", ["LeakyRelu"]),
        ("a = Div(x, two) y = Max(x, a)", ["LeakyRelu"]),
        ("a = Mul(x, two) y = Max(x, a)", ["Mul", "Max"]),
        ("a = Neg(x) y = Max(x, a)", ["Neg", "Max"]),
    ],
)
def test_a_maximum_with_a_slope_is_a_leaky_relu(body, left):
    assert operators(body) == left


@pytest.mark.parametrize(
    "body",
    [
        "e = Mul(x, turned) f = Erf(e) g = Add(f, one) h = Mul(x, g) y = Mul(h, half)",
        "e = Mul(turned, x) f = Erf(e) g = Add(one, f) h = Mul(x, half) y = Mul(h, g)",
        "e = Div(x, root) f = Erf(e) g = Add(f, one) h = Mul(g, half) y = Mul(x, h)",
        "e = Mul(x, turned) f = Erf(e) g = Add(f, one) h = Div(x, two) y = Mul(g, h)",
    ],
)
def test_a_gelu_is_spelled_as_onnxruntime_merges_it(body):
    text = f"(float[n, 3, 4] x) => (float[n, 3, 4] y) {{ {body} }}"

    found, left = optimized(text, numbers_in(body))

    assert left == ["Div", "Erf", "Add", "Mul", "Mul"]
    assert kernels_of(found) == ["Gelu"]


@pytest.mark.parametrize(
    "body",
    [
        "e = Div(x, root) f = Erf(e) g = Add(f, one) h = Mul(x, g) y = Mul(h, half)",
        "e = Mul(x, half) f = Erf(e) g = Add(f, one) h = Mul(x, g) y = Mul(h, half)",
        "e = Mul(x, turned) f = Erf(e) g = Add(f, one) h = Mul(x, g) y = Mul(h, three)",
        "e = Mul(x, turned) f = Erf(e) g = Add(f, two) h = Mul(x, g) y = Mul(h, half)",
    ],
)
def test_what_is_merged_already_or_no_gelu_stays(body):
    text = f"(float[n, 3, 4] x) => (float[n, 3, 4] y) {{ {body} }}"

    found, _ = optimized(text, numbers_in(body))

    assert not [change for change in found.applied if change.rule == "plain_gelu"]

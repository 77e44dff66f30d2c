"""Normalizations of rows are one operator in onnxruntime, however they are spelled."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from quant_core.model.session import optimized_graph
from tests.unit.optimize.checked import optimized

RNG = np.random.default_rng(7)
CONSTANTS = {
    "g": RNG.uniform(0.5, 2, 8).astype(np.float32),
    "b": RNG.standard_normal(8).astype(np.float32),
    "e": np.array(1e-3, np.float32),
    "one": np.array(1, np.float32),
    "two": np.array(2, np.float32),
}
MEAN = "m = ReduceMean<axes = [-1]>(x) d = Sub(x, m)"
QUOTIENTS = {
    "Div": "n = Div({0}, s)",
    "Reciprocal": "i = Reciprocal(s) n = Mul({0}, i)",
    "1 / s": "i = Div(one, s) n = Mul(i, {0})",
}
SQUARES = {"Pow": "p = Pow({0}, two)", "Mul": "p = Mul({0}, {0})"}
AFFINES = {
    "g and b": "k = Mul(n, g) y = Add(k, b)",
    "g": "y = Mul(g, n)",
    "neither": "y = Identity(n)",
}


def body(values: str, square: str, quotient: str, affine: str) -> str:
    root = "v = ReduceMean<axes = [-1]>(p) a = Add(v, e) s = Sqrt(a)"
    parts = (SQUARES[square], root, QUOTIENTS[quotient], AFFINES[affine])
    return " ".join(parts).format(values)


def normed(text: str, *, x: str = "n, 3, 8"):
    used = {n: c for n, c in CONSTANTS.items() if f"{n})" in text or f"{n}," in text}
    found, operators = optimized(f"(float[{x}] x) => (float[{x}] y) {{ {text} }}", used)
    ran = optimized_graph(ir.to_proto(found.model).SerializeToString()).graph.node
    return operators, [node.op_type for node in ran]


@pytest.mark.parametrize("affine", AFFINES)
@pytest.mark.parametrize("quotient", QUOTIENTS)
@pytest.mark.parametrize("square", SQUARES)
def test_a_layer_norm_is_one_operator(square, quotient, affine):
    operators, _ = normed(f"{MEAN} {body('d', square, quotient, affine)}")

    assert operators[:1] == ["LayerNormalization"]
    assert set(operators[1:]) <= {"Identity"}


@pytest.mark.parametrize(
    ("others", "kept"),
    [
        ("float[n, 3, 8] y, float[n, 3, 8] n", ["Mul"]),
        ("float[n, 3, 8] y, float[n, 3, 8] z", ["Mul", "Mul"]),
    ],
    ids=["an output", "read twice"],
)
def test_a_layer_norm_that_others_see_keeps_its_scale_apart(others, kept):
    text = f"{MEAN} {body('d', 'Mul', 'Div', 'g')} z = Mul(n, two)"
    _, operators = optimized(f"(float[n, 3, 8] x) => ({others}) {{ {text} }}", CONSTANTS)

    assert operators == ["LayerNormalization", *kept]


@pytest.mark.parametrize("quotient", QUOTIENTS)
@pytest.mark.parametrize("square", SQUARES)
def test_a_root_mean_square_norm_is_merged_by_onnxruntime(square, quotient):
    _, ran = normed(body("x", square, quotient, "g"))

    assert ran == ["SimplifiedLayerNormalization"]


@pytest.mark.parametrize("affine", AFFINES)
@pytest.mark.parametrize("quotient", QUOTIENTS)
@pytest.mark.parametrize(
    ("axis", "shape"), [(1, "n, 8, 3, 5"), (-2, "n, 8, 3"), (1, "2, 8, k"), (2, "n, 2, 8, 3")]
)
def test_a_layer_norm_over_an_inner_axis_is_one_operator_between_transposes(
    axis, shape, quotient, affine
):
    inner = len(shape.split(",")) - 1 - axis % len(shape.split(","))
    constants = {n: c.reshape(-1, *[1] * inner) if c.size > 1 else c for n, c in CONSTANTS.items()}
    text = f"{MEAN} {body('d', 'Mul', quotient, affine)}".replace("[-1]", f"[{axis}]")
    sketch = f"(float[{shape}] x) => (float[{shape}] y) {{ {text} }}"
    found, operators = optimized(sketch, constants, timed="inner_layer_norm")

    assert operators[:3] == ["Transpose", "LayerNormalization", "Transpose"]
    assert set(operators[3:]) <= {"Identity"}
    assert [change.rule for change in found.applied] == ["inner_layer_norm"]


@pytest.mark.parametrize(
    "text",
    [
        f"{MEAN} {body('d', 'Mul', 'Div', 'g')}".replace("y =", "z =") + " y = Add(z, d)",
        f"{MEAN} {body('d', 'Mul', 'Div', 'g')}".replace("[-1]>(p)", "[1]>(p)"),
        body("x", "Mul", "Div", "neither"),
    ],
    ids=["the distance is read too", "another axis", "no g"],
)
def test_what_is_no_norm_stays(text):
    operators, ran = normed(text)

    assert "Sqrt" in operators
    assert "LayerNormalization" not in ran

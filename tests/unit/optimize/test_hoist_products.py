"""What a loop multiplies row by row is multiplied before it, where the weight is the same."""

from __future__ import annotations

import numpy as np
import pytest

from tests.unit.optimize.checked import optimized

RNG = np.random.default_rng(8)
LOOP = """(float[5, n, 4] xs, float[n, 3] s) => (float[n, 3] y, float[5, n, 3] ys) {{
    y, ys = Loop <body = body (int64 i, bool go_on, float[n, 3] before)
        => (bool go_on_, float[n, 3] after, float[n, 3] each) {{
        go_on_ = Identity(go_on)
        {product}
        after = Tanh(sum)
        each = Identity(after)
    }}> (steps, , s)
}}"""


def random(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def looped(product: str, **constants: np.ndarray) -> tuple[list[str], list[str]]:
    """The operators ahead of the Loop and in it, after the rule."""
    found, operators = optimized(
        LOOP.format(product=product),
        {"steps": np.array(5), "w": random(4, 3), "u": random(3, 3), **constants},
        timed="hoist_products",
    )
    (loop,) = (n for n in found.model.graph if n.op_type == "Loop")
    return operators, [n.op_type for n in loop.attributes["body"].as_graph()]


@pytest.mark.parametrize(
    ("product", "before"),
    [
        ("x = MatMul(row, w)", ["MatMul"]),
        ("x = Gemm(row, w, b)", ["MatMul", "Add"]),
        ("x = Gemm<transB = 1>(row, w_turned)", ["MatMul"]),
    ],
)
def test_a_product_of_rows_from_outside_is_made_before_the_loop(product, before):
    text = f"row = Gather(xs, i) {product} h = MatMul(before, u) sum = Add(x, h)"

    operators, inside = looped(text, b=random(3), w_turned=random(3, 4))

    assert operators == [*before, "Loop"]
    assert inside.count("MatMul") == 1
    assert "Gemm" not in inside


@pytest.mark.parametrize(
    "product",
    [
        "row = Gather(xs, i) x = MatMul(row, w) h = MatMul(x, u) sum = Add(h, before)",
        "row = Gather(xs, i) a = Tanh(row) x = MatMul(a, w) sum = Add(x, before)",
        "row = Gather(before, first) x = MatMul(row, u) sum = Add(x, before)",
    ],
    ids=["the second of two", "behind something else", "of its own state"],
)
def test_other_products_stay_in_the_loop(product):
    _, inside = looped(product, first=np.array([0]))

    assert "MatMul" in inside

"""Products with the transpose of a weight read the weight itself."""

from __future__ import annotations

import numpy as np
import pytest

from tests.unit.optimize.checked import optimized

RNG = np.random.default_rng(3)


def random(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(
    "product",
    ["MatMul(t, u)", "Gemm(t, u, b)", "Gemm<transA = 1, transB = 1, alpha = 0.5>(t, u, b)"],
)
def test_a_product_with_a_transposed_weight_is_a_gemm_of_the_weight(product):
    found, operators = optimized(
        f"""(float[8, 8] x) => (float[8, 8] y)
            {{ a = MatMul(x, w) t = Tanh(a) u = Transpose<perm = [1, 0]>(w) y = {product} }}""",
        {"w": random(8, 8), "b": random(8)},
    )

    assert operators == ["MatMul", "Tanh", "Gemm"]
    assert [change.node for change in found.applied] == ["y"]
    assert len({node.inputs[1] for node in found.model.graph if len(node.inputs) > 1}) == 1


def test_a_product_of_more_axes_and_one_by_what_is_computed_stay():
    found, operators = optimized(
        """(float[n, 3, 8] x, float[8, 8] z) => (float[n, 3, 8] y, float[8, 8] p)
           { u = Transpose(w) y = MatMul(x, u) v = Transpose(z) p = MatMul(z, v) }""",
        {"w": random(8, 8)},
    )

    assert operators == ["Transpose", "MatMul", "Transpose", "MatMul"]
    assert not found.applied

"""Pixels that nobody reads are not computed."""

from __future__ import annotations

import numpy as np
import pytest

from quant_core.model import graph
from tests.unit.optimize.checked import optimized

RNG = np.random.default_rng(7)
PIXEL = "kernel_shape = [1, 1], strides = [2, 2]"
SAME = "kernel_shape = [3, 3], pads = [1, 1, 1, 1]"
ENDS = "(float[n, 4, 9, 8] x) => (float[n, c, h, w] y, float[n, c2, h2, w2] z)"


def weights(text: str) -> dict[str, np.ndarray]:
    """Weights w (3 x 3) and u (1 x 1) with biases as far as the text reads them."""
    constants = {
        "w": RNG.standard_normal((4, 4, 3, 3)).astype(np.float32),
        "u": RNG.standard_normal((4, 4, 1, 1)).astype(np.float32),
        "v": RNG.standard_normal((6, 4, 1, 1)).astype(np.float32),
        "low": np.float32(0),
        "shift": RNG.standard_normal((1, 4, 1, 1)).astype(np.float32),
        "all": RNG.standard_normal((1, 4, 9, 8)).astype(np.float32),
    }
    return {name: array for name, array in constants.items() if f" {name})" in text}


def strides(model) -> list[tuple[int, ...]]:
    nodes = [n for n in model.graph if n.op_type in ("Conv", "MaxPool", "AveragePool")]
    return [tuple(graph.attribute(n, "strides", (1, 1))) for n in nodes]


def test_the_strides_of_a_block_of_a_resnet_move_to_the_convs_before_it():
    text = f"""{ENDS} {{
        p = Conv<{SAME}>(x, w) q = Relu(p) a = Conv<{SAME}>(q, w) b = Relu(a) e = Conv(b, u)
        s = Add(e, q) r = Relu(s) y = Conv<{PIXEL}>(r, v) z = Conv<{PIXEL}>(r, u)
    }}"""

    found, operators = optimized(text, weights(text))

    # the 1 x 1 Conv before the sum hands what it is given to the 3 x 3 one
    assert operators.count("MaxPool") == 1
    assert strides(found.model) == [(1, 1), (2, 2), (1, 1), (2, 2), (1, 1), (1, 1)]
    assert [change.node for change in found.applied] == ["e", "a"]


def test_strides_are_multiplied_and_a_pool_that_picks_is_gone():
    text = f"""(float[n, 4, 17, 16] x) => (float[n, c, h, w] y) {{
        a = Conv<kernel_shape = [3, 3], strides = [2, 1]>(x, w) t = Clip(a, low)
        q = MaxPool<{PIXEL}>(t) y = Sigmoid(q)
    }}"""

    found, operators = optimized(text, weights(text))

    assert operators == ["Conv", "Clip", "Sigmoid"]
    assert strides(found.model) == [(4, 2)]


def test_what_does_not_vary_along_the_image_is_left_alone():
    text = f"""(float[n, 4, 9, 8] x) => (float[n, c, h, w] y) {{
        a = Conv<{SAME}>(x, w) g = GlobalAveragePool(x) m = Mul(a, g) s = Add(m, shift)
        t = Sigmoid(s) y = Conv<{PIXEL}>(t, u)
    }}"""

    found, operators = optimized(text, weights(text))

    assert "MaxPool" not in operators
    assert strides(found.model) == [(2, 2), (1, 1)]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (f"a = Conv<{SAME}>(x, w) y = Conv<{PIXEL}>(a, u) z = Relu(a)", "another reads all"),
        (f"a = Conv<{SAME}>(x, w) z = Relu(a) y = Conv<{PIXEL}>(z, u)", "all are an output"),
        (f"y = Relu(x) z = Conv<{PIXEL}>(x, u)", "no Conv makes them"),
        (f"a = Relu(x) y = Conv<{PIXEL}>(a, u) z = Neg(x)", "no Conv makes them"),
        (
            f"a = Conv<{SAME}>(x, w) y = Conv<{PIXEL}>(a, u) "
            "z = Conv<kernel_shape = [1, 1], strides = [1, 2]>(a, u)",
            "readers step differently",
        ),
        (
            f"a = Conv<{SAME}>(x, w) y = Conv<{PIXEL}, pads = [1, 1, 0, 0]>(a, u) z = Neg(x)",
            "its padding is read",
        ),
        (
            'a = Conv<kernel_shape = [3, 3], auto_pad = "SAME_UPPER">(x, w) '
            f"y = Conv<{PIXEL}>(a, u) z = Neg(x)",
            "padding depends on strides",
        ),
        (
            f"a = Conv<{SAME}>(x, w) b = Add(a, all) y = Conv<{PIXEL}>(b, u) z = Neg(x)",
            "a constant has all pixels",
        ),
        (
            f"a = Conv<{SAME}>(x, w) b = Softmax<axis = 3>(a) y = Conv<{PIXEL}>(b, u) z = Neg(x)",
            "each pixel depends on others",
        ),
        (
            f"a = Conv<{SAME}>(x, w) m = Greater(x, low) b = Where(m, a, x) "
            f"y = Conv<{PIXEL}>(b, u) z = Cast<to = 1>(m)",
            "no pool reads what is true and false",
        ),
    ],
)
def test_strides_stay_where_they_are_if(text, why):
    text = f"{ENDS} {{ {text} }}"

    found, _ = optimized(text, weights(text))

    assert not found.applied, why
    assert not found.undone, why

"""Shapes that the graph fixes are constants."""

from __future__ import annotations

import numpy as np

from tests.unit.optimize.checked import optimized

HEADS = """s = Shape(x) b = Gather(s, zero) t = Gather(s, one) w = Gather(s, two) d = Div(w, four)
           bu = Unsqueeze(b, axis) tu = Unsqueeze(t, axis) du = Unsqueeze(d, axis)
           q = Concat<axis = 0>(bu, tu, heads, du)"""
NUMBERS = {"zero": np.int64(0), "one": np.int64(1), "two": np.int64(2), "four": np.int64(4),
           "axis": np.array([0]), "heads": np.array([4])}  # fmt: skip


def test_the_heads_of_an_attention_need_no_computed_shape():
    found, operators = optimized(
        f"(float[n, t, 12] x) => (float[n, t, h, k] y) {{ {HEADS} y = Reshape(x, q) }}", NUMBERS
    )

    assert operators == ["Reshape"]
    (reshape,) = found.model.graph
    assert reshape.inputs[1].const_value.numpy().tolist() == [0, 0, 4, 3]


def test_what_is_left_of_axes_that_are_merged_is_computed_by_the_reshape():
    found, operators = optimized(
        """(float[n, 3, h, w] x) => (float[n, 3, m] y)
           { s = Shape(x) a = Slice(s, from, to) c = Concat<axis = 0>(a, rest)
             y = Reshape(x, c) }""",
        {"from": np.array([0]), "to": np.array([2]), "rest": np.array([-1])},
    )

    assert operators == ["Reshape"]
    (reshape,) = found.model.graph
    assert reshape.inputs[1].const_value.numpy().tolist() == [0, 3, -1]


def test_two_open_axes_stay_computed():
    _, operators = optimized(
        """(float[n, t] x) => (float[t, n] y)
           { s = Shape(x) a = Gather(s, order) y = Reshape(x, a) }""",
        {"order": np.array([1, 0])},
    )

    assert operators == ["Shape", "Gather", "Reshape"]


def test_an_expand_to_the_shape_that_is_there_goes():
    _, operators = optimized(
        "(float[n, 3] x) => (float[n, 3] y) { s = Shape(x) e = Expand(x, s) y = Relu(e) }", {}
    )

    assert operators == ["Relu"]


def test_sizes_that_a_file_claims_of_an_output_are_not_believed():
    """Exporters write them down and change the graph afterwards."""
    optimized(f"(float[n, t, 12] x) => (float[1, m] y) {{ {HEADS} y = Reshape(x, q) }}", NUMBERS)

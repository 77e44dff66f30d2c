"""Operators that only give a tensor another shape are as few as can do it."""

from __future__ import annotations

import numpy as np
import pytest

from tests.unit.optimize.checked import optimized

SHAPES = {
    "first": np.array([0]),
    "last": np.array([-1]),
    "two": np.array([2]),
    "flat": np.array([0, -1]),
    "half": np.array([1, 2, 4]),
    "row": np.array([1, 1, 8]),
    "i": np.array(1),
}


def left(text: str) -> list[str]:
    body = text.partition("{")[2]
    used = {n: c for n, c in SHAPES.items() if f"{n})" in body or f"{n}," in body}
    return optimized(text, used, n=2)[1]


@pytest.mark.parametrize(
    ("shapes", "body", "operators"),
    [
        (
            "(float[1, 8] x) => (float[1, 8] y)",
            "a = Unsqueeze(x, first) b = Squeeze(a, first) y = Relu(b)",
            ["Relu"],
        ),
        (
            "(float[n, 8] x) => (float[n, 8] y)",
            "a = Unsqueeze(x, last) b = Squeeze(a, two) y = Relu(b)",
            ["Relu"],
        ),
        (
            "(float[1, 8, 1] x) => (float[1, 1, 8] y)",
            "a = Squeeze(x, last) y = Unsqueeze(a, first)",
            ["Reshape"],
        ),
        (
            "(float[n, 2, 4] x) => (float[n, 8, 1] y)",
            "a = Flatten(x) y = Unsqueeze(a, last)",
            ["Reshape"],
        ),
        (
            "(float[1, 8] x) => (float[1, 1, 8] y)",
            "a = Reshape(x, half) b = Relu(a) y = Reshape(b, row)",
            ["Reshape", "Relu", "Reshape"],
        ),
        (
            "(float[1, 1] x) => (float[1, 1] y)",
            "a = ReduceMean<axes = [1], keepdims = 0>(x) b = Unsqueeze(a, last) y = Relu(b)",
            ["Relu"],
        ),
        ("(float[1, 2] x) => (float[1, 1] y)", "y = ReduceMean<axes = [1]>(x)", ["ReduceMean"]),
        (
            "(float[2, 8] x) => (float[1, 8] y)",
            "a = Gather(x, i) b = Unsqueeze(a, first) y = Relu(b)",
            ["Gather", "Relu"],
        ),
        (
            "(float[2, 8] x) => (float[8, 1] y)",
            "a = Gather(x, i) b = Unsqueeze(a, last) y = Relu(b)",
            ["Gather", "Unsqueeze", "Relu"],
        ),
        (
            "(float[1, 8] x) => (float[1, 1, 8] y, float[1, 8] z)",
            "a = Unsqueeze(x, first) y = Relu(a) b = Squeeze(a, first) z = Sigmoid(b)",
            ["Unsqueeze", "Relu", "Sigmoid"],
        ),
        (  # a node without inputs
            "(float[1, 8] x) => (float[1, 8] y)",
            "none = SequenceEmpty() s = SequenceInsert(none, x) a = ConcatFromSequence<axis = 0>(s)"
            "y = Relu(a)",
            ["SequenceEmpty", "SequenceInsert", "ConcatFromSequence", "Relu"],
        ),
    ],
)
def test_shapes_in_a_row_are_one_or_none(shapes, body, operators):
    assert left(f"{shapes} {{ {body} }}") == operators


def test_the_result_of_a_model_has_a_node_of_its_own():
    assert left(
        "(float[1, 8] x) => (float[1, 8] y) { a = Unsqueeze(x, first) y = Squeeze(a, first) }"
    ) == ["Reshape"]

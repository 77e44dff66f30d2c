"""Operators take forms that onnxruntime computes in its blocked layout, or along the last axis."""

from __future__ import annotations

import numpy as np

from tests.unit.optimize.checked import optimized

RNG = np.random.default_rng(6)


def random(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def test_a_conv_over_time_turns_until_it_reaches_what_knows_no_axes():
    found, operators = optimized(
        """(float[n, 12] x) => (float[n, 5] y)
           { i = Unsqueeze(x, axes)
             p = Pad(i, pads) c = Conv<strides = [2, 1]>(p, w, b) r = Relu(c)
             m = MaxPool<kernel_shape = [2, 1], strides = [2, 1]>(r)
             f = Flatten<axis = 1>(m) y = Gemm(f, g) }""",
        {
            "axes": np.array([1, 3]),
            "pads": np.array([0, 0, 1, 0, 0, 0, 2, 0]),
            "w": random(4, 1, 3, 1),
            "b": random(4),
            "g": random(12, 5),
        },
        timed="wide_kernels",
    )

    assert operators == [
        "Unsqueeze",
        "Transpose",
        "Pad",
        "Conv",
        "Relu",
        "MaxPool",
        "Transpose",
        "Flatten",
        "Gemm",
    ]
    conv = next(n for n in found.model.graph if n.op_type == "Conv")
    assert conv.inputs[1].const_value.shape == (4, 1, 1, 3)
    assert [change.node for change in found.applied] == ["c"]


def test_a_conv_over_images_stays_as_it_is():
    found, _ = optimized(
        "(float[n, 2, 6, 6] x) => (float[n, 4, 4, 6] y) { y = Conv(x, w) }",
        {"w": random(4, 2, 3, 1)},
        timed="wide_kernels",
    )

    assert not found.applied


def test_a_turned_tensor_that_is_an_output_is_turned_back():
    _, operators = optimized(
        """(float[n, 2, 6, 1] x) => (float[n, 4, 4, 1] c, float[n, 4, 4, 1] y)
           { c = Conv(x, w) y = Relu(c) }""",
        {"w": random(4, 2, 3, 1)},
        timed="wide_kernels",
    )

    assert operators.count("Transpose") == 3


def test_an_add_between_convs_becomes_a_depthwise_conv():
    found, operators = optimized(
        """(float[n, 2, 6, 6] x) => (float[n, 2, 6, 6] y)
           { c = Conv<pads = [1, 1, 1, 1]>(x, w) r = Relu(c) a = Add(r, t)
             y = Conv<pads = [1, 1, 1, 1]>(a, w) }""",
        {"w": random(2, 2, 3, 3), "t": np.float32([0.5])},
        timed="affine_as_conv",
    )

    assert operators == ["Conv", "Relu", "Conv", "Conv"]
    assert [change.rule for change in found.applied] == ["affine_as_conv"]


def test_one_slope_makes_a_prelu_a_leaky_relu():
    _, operators = optimized(
        "(float[n, 3, 4, 4] x) => (float[n, 3, 4, 4] y) { y = PRelu(x, s) }",
        {"s": np.full((3, 1, 1), 0.25, np.float32)},
    )

    assert operators == ["LeakyRelu"]


def test_slopes_of_channels_become_two_convs_and_a_sum():
    _, operators = optimized(
        "(float[n, 3, 4, 4] x) => (float[n, 3, 4, 4] y) { y = PRelu(x, s) }",
        {"s": np.float32([0.25, -1, 0.5]).reshape(3, 1, 1)},
        timed="prelu_as_convs",
    )

    assert operators == ["Conv", "Conv", "Relu", "Add"]


def test_of_a_slope_above_one_the_relu_comes_before_the_conv():
    _, operators = optimized(
        "(float[n, 3, 4, 4] x) => (float[n, 3, 4, 4] y) { y = PRelu(x, s) }",
        {"s": np.float32([0.5, 2, 0.1]).reshape(3, 1, 1)},
        timed="prelu_as_convs",
    )

    assert operators == ["Conv", "Relu", "Conv", "Add"]


def test_slopes_of_columns_stay():
    _, operators = optimized(
        "(float[n, 3, 4, 4] x) => (float[n, 3, 4, 4] y) { y = PRelu(x, s) }",
        {"s": random(4)},
        timed="prelu_as_convs",
    )

    assert operators == ["PRelu"]


def test_a_softmax_over_channels_moves_to_the_last_axis_with_the_conv_behind_it():
    _, operators = optimized(
        """(float[n, 16, 4, 7] x) => (float[n, 2, 4, 7] y)
           { s = Softmax<axis = 1>(x) y = Conv(s, w, b) }""",
        {"w": random(2, 16, 1, 1), "b": random(2)},
        timed="inner_softmax",
    )

    assert operators == ["Transpose", "Softmax", "MatMul", "Add", "Transpose"]


def test_a_softmax_loses_the_detour_over_a_matrix():
    found, operators = optimized(
        """(float[n, 3, 5] x) => (float[n, 3, 5] y)
           { f = Flatten<axis = 2>(x) s = Softmax<axis = -1>(f) h = Shape(x) y = Reshape(s, h) }""",
        {},
    )

    assert operators == ["Softmax"]
    assert found.names == {"f": "s", "y": "s"}


def test_a_pad_of_nothing_goes_and_others_stay():
    found, operators = optimized(
        """(float[n, 2, 6, 6] x) => (float[n, 2, 6, 6] y, float[n, 2, 6, 6] z)
           { p = Pad(x, none) q = Pad(p, some) r = Relu(p) c = Conv(q, w)
             y = Mul(r, c) z = Pad(y, none) }""",
        {
            "none": np.zeros(8, np.int64),
            "some": np.array([0, 0, 1, 1, 0, 0, 1, 1]),
            "w": random(2, 2, 3, 3),
        },
    )

    assert operators == ["Pad", "Relu", "Conv", "Mul", "Pad"]
    assert [change.rule for change in found.applied] == ["empty_pads"]

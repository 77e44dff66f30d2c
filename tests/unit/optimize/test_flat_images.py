"""Convs over one axis become Convs over images of one row."""

from __future__ import annotations

import numpy as np

from tests.unit.optimize.checked import optimized

RNG = np.random.default_rng(8)


def random(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def test_a_chain_of_convs_over_time_is_entered_and_left_once():
    found, operators = optimized(
        """(float[n, 2, 12] x) => (float[n, 3, 4] y) {
           c = Conv<kernel_shape = [3], strides = [2], pads = [2, 0]>(x, v, b)
           l = LeakyRelu(c) p = PRelu(l, s) a = Add(p, r) k = Concat<axis = 1>(a, c)
           m = MaxPool<kernel_shape = [3], pads = [1, 0]>(k)
           y = Conv<dilations = [2], group = 1>(m, w) }""",
        {"v": random(4, 2, 3), "b": random(4), "s": np.abs(random(4, 1)), "r": random(6),
         "w": random(3, 8, 1)},
        timed="flat_images",
    )  # fmt: skip

    between = ["Conv", "LeakyRelu", "PRelu", "Add", "Concat", "MaxPool", "Conv"]
    assert operators == ["Unsqueeze", *between, "Squeeze"]
    assert len(found.applied) == 1


def test_what_else_is_read_of_a_part_keeps_its_three_axes():
    _, operators = optimized(
        """(float[n, 2, 6] x) => (float[n, 4, 4] c, float[n, 4, 4] z) {
           c = Conv(x, w) r = Relu(c) s = Softmax<axis = 2>(r) t = Mul(r, s) z = Add(t, c) }""",
        {"w": random(4, 2, 3)},
        timed="flat_images",
    )

    assert operators.count("Unsqueeze") == 2  # of x and of s
    assert operators.count("Squeeze") == 3  # c, r and z


def test_a_conv_over_images_and_one_whose_weight_is_shared_stay():
    found, _ = optimized(
        """(float[n, 2, 6, 6] x, float[n, 2, 6] t) => (float[n, 4, 4, 6] y, float[n, 4, 4] z) {
           y = Conv(x, w) a = Conv(t, v) b = Conv(t, v) z = Mul(a, b) }""",
        {"w": random(4, 2, 3, 1), "v": random(4, 2, 3)},
        timed="flat_images",
    )

    assert not found.applied

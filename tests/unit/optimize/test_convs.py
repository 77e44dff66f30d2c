"""Convs that can be one become one, and a Conv that is only split becomes several."""

from __future__ import annotations

import numpy as np
import pytest

from tests.unit.optimize.checked import optimized

RNG = np.random.default_rng(7)


def random(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


NORM = {"g": random(4), "t": random(4), "m": random(4), "v": np.abs(random(4)) + 1}


def test_the_branches_of_a_repvgg_block_become_one_conv():
    found, operators = optimized(
        """(float[n, 4, 6, 6] x) => (float[n, 4, 6, 6] y)
           { a = Conv<pads = [1, 1, 1, 1]>(x, w3) b = Conv(x, w1, c)
             i = BatchNormalization(x, g, t, m, v)
             s = Add(a, b) z = Add(s, i) y = Relu(z) }""",
        {"w3": random(4, 4, 3, 3), "w1": random(4, 4, 1, 1), "c": random(4), **NORM},
    )

    assert operators == ["Conv", "Relu"]
    assert set(found.names.values()) == {"a"}


def test_the_tensor_itself_is_a_branch_beside_two_depthwise_convs():
    _, operators = optimized(
        """(float[n, 4, 6, 6] x) => (float[n, 4, 6, 6] y)
           { a = Conv<pads = [1, 1, 1, 1], group = 4>(x, w3) b = Conv<group = 4>(x, w1)
             s = Add(a, x) y = Add(s, b) }""",
        {"w3": random(4, 1, 3, 3), "w1": random(4, 1, 1, 1)},
    )

    assert operators == ["Conv"]


def test_a_plain_residual_stays_an_add():
    """One in the diagonal would take the integers of a quantized weight from all the others."""
    _, operators = optimized(
        """(float[n, 4, 6, 6] x) => (float[n, 4, 6, 6] y)
           { a = Conv<pads = [1, 1, 1, 1]>(x, w) y = Add(a, x) }""",
        {"w": random(4, 4, 3, 3)},
    )

    assert operators == ["Conv", "Add"]


def test_branches_of_which_no_kernel_holds_the_other_stay_apart():
    _, operators = optimized(
        """(float[n, 4, 6, 6] x) => (float[n, 4, 6, 6] y)
           { a = Conv<pads = [0, 1, 0, 1]>(x, wide) b = Conv<pads = [1, 0, 1, 0]>(x, tall)
             y = Add(a, b) }""",
        {"wide": random(4, 4, 1, 3), "tall": random(4, 4, 3, 1)},
    )

    assert operators == ["Conv", "Conv", "Add"]


@pytest.mark.parametrize(("middle", "count"), [(8, 1), (2, 2)])
def test_two_convs_become_one_where_that_is_less_work(middle, count):
    _, operators = optimized(
        """(float[n, 3, 6, 6] x) => (float[n, 4, 4, 4] y)
           { a = Conv(x, w3, b) y = Conv(a, w1, c) }""",
        {
            "w3": random(middle, 3, 3, 3),
            "b": random(middle),
            "w1": random(4, middle, 1, 1),
            "c": random(4),
        },
    )

    assert operators == ["Conv"] * count


def test_a_conv_that_is_only_split_becomes_one_for_each_part_with_its_activation():
    found, operators = optimized(
        """(float[n, 3, 6, 6] x) => (float[n, 1, 6, 6] y, float[n, 3, 6, 6] z)
           { c = Conv(x, w, b) s = Sigmoid(c) m = Mul(c, s) y, z = Split<axis = 1>(m, sizes) }""",
        {"w": random(4, 3, 1, 1), "b": random(4), "sizes": np.array([1, 3])},
        timed="split_convs",
    )

    assert sorted(operators) == ["Conv", "Conv", "Mul", "Mul", "Sigmoid", "Sigmoid"]
    assert found.names == {"s": "c", "m": "c", "y": "c"}


def test_a_conv_that_is_split_and_read_stays_whole():
    _, operators = optimized(
        """(float[n, 3, 6, 6] x) => (float[n, 2, 6, 6] y, float[n, 2, 6, 6] z, float[n, 4, 6, 6] r)
           { c = Conv(x, w) y, z = Split<axis = 1>(c, sizes) r = Relu(c) }""",
        {"w": random(4, 3, 1, 1), "sizes": np.array([2, 2])},
        timed="split_convs",
    )

    assert sorted(operators) == ["Conv", "Relu", "Split"]


@pytest.mark.parametrize(
    ("outputs", "sizes", "block"), [(1, (8, 4), 4), (4, (8, 8), 2), (1, (6, 4), 2)]
)
def test_neighbouring_pixels_of_a_conv_with_few_outputs_become_channels(outputs, sizes, block):
    h, w = sizes

    found, operators = optimized(
        f"""(float[n, 5, {h}, {w}] x) => (float[n, {outputs}, {h}, {w}] y)
            {{ c = Conv<pads = [1, 1, 1, 1]>(x, w, b) y = Relu(c) }}""",
        {"w": random(outputs, 5, 3, 3), "b": random(outputs)},
        timed="stack_outputs",
    )

    assert operators == ["Conv", "Relu", "DepthToSpace"]
    assert next(iter(found.model.graph)).attributes["strides"].value == (block, block)


def test_strides_and_odd_pads_are_kept_when_pixels_become_channels():
    found, _ = optimized(
        """(float[n, 2, 9, 8] x) => (float[n, 1, 4, 4] y)
           { y = Conv<pads = [0, 1, 0, 0], strides = [2, 2]>(x, w) }""",
        {"w": random(1, 2, 3, 2)},
        timed="stack_outputs",
    )

    assert [change.node for change in found.applied] == ["y"]


def test_a_conv_with_many_outputs_or_open_or_odd_sizes_is_not_stacked():
    _, operators = optimized(
        """(float[n, 2, 8, w] x) => (float[n, 12, 6, v] y, float[n, 1, 6, v] z)
           { y = Conv(x, many) z = Conv(x, few) }""",
        {"many": random(12, 2, 3, 3), "few": random(1, 2, 3, 3)},
        timed="stack_outputs",
        n=8,
    )

    assert operators == ["Conv", "Conv"]


def test_convs_of_one_pixel_become_matrix_products():
    found, operators = optimized(
        """(float[n, 8, 5, 5] x) => (float[n, 8, 5, 5] y)
           { p = GlobalAveragePool(x) a = Conv(p, w, b) r = Relu(a) e = Conv(r, v)
             h = HardSigmoid(e) y = Mul(x, h) }""",
        {"w": random(2, 8, 1, 1), "b": random(2), "v": random(8, 2, 1, 1)},
        timed="pixel_gemms",
    )

    layers = ["Gemm", "Relu", "Gemm", "HardSigmoid"]
    assert operators == ["GlobalAveragePool", "Reshape", *layers, "Reshape", "Mul"]
    assert [change.node for change in found.applied] == ["a"]


def test_convs_of_more_pixels_or_of_groups_stay_convs():
    _, operators = optimized(
        """(float[n, 8, 5, 5] x) => (float[n, 8, 1, 1] y, float[n, 8, 5, 5] z)
           { p = GlobalAveragePool(x) y = Conv<group = 8>(p, w) z = Conv(x, v) }""",
        {"w": random(8, 1, 1, 1), "v": random(8, 8, 1, 1)},
        timed="pixel_gemms",
    )

    assert operators == ["GlobalAveragePool", "Conv", "Conv"]

"""Affine operators disappear into the linear operators around them, wherever that is exact."""

from __future__ import annotations

import numpy as np
import pytest

from tests.unit.optimize.checked import optimized

RNG = np.random.default_rng(5)
W1 = RNG.standard_normal((4, 3, 1, 1)).astype(np.float32)
W3 = RNG.standard_normal((4, 4, 3, 3)).astype(np.float32)
DEPTHWISE = RNG.standard_normal((4, 1, 3, 3)).astype(np.float32)
B = RNG.standard_normal(4).astype(np.float32)
FOUR = np.array([0.5, 2, 3, 1.5], np.float32)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1), (1, 1, 1, 1), (4, 1, 1), (1, 4, 1, 1)])
def test_a_mul_and_an_add_go_into_the_conv_before_them(shape):
    numbers = {"s": np.full(shape, 3, np.float32), "t": np.full(shape, -2, np.float32)}

    found, operators = optimized(
        """(float[n, 3, 5, 5] x) => (float[n, 4, 5, 5] y)
           { c = Conv(x, w) m = Mul(s, c) y = Add(m, t) }""",
        {"w": W1, **numbers},
    )

    assert operators == ["Conv"]
    assert found.names == {"m": "c", "y": "c"}


@pytest.mark.parametrize("op_type", ["Conv", "ConvTranspose"])
def test_numbers_for_each_channel_go_into_groups(op_type):
    text = f"""(float[n, 4, 5, 5] x) => (float[n, 4, 7, 7] y)
        {{ c = {op_type}<group = 2>(x, w) m = Mul(c, s) a = Add(m, t) y = Relu(a) }}"""
    weight = RNG.standard_normal((4, 2, 3, 3)).astype(np.float32)

    _, operators = optimized(
        text.replace("7", "3") if op_type == "Conv" else text,
        {"w": weight, "s": FOUR[:, None, None], "t": B[:, None, None]},
    )

    assert operators == [op_type, "Relu"]


def test_a_conv_that_others_read_too_keeps_its_result():
    _, operators = optimized(
        """(float[n, 3, 5, 5] x) => (float[n, 4, 5, 5] y, float[n, 4, 5, 5] z)
           { c = Conv(x, w) y = Mul(c, s) z = Relu(c) }""",
        {"w": W1, "s": np.float32(2)},
    )

    assert operators == ["Conv", "Mul", "Relu"]


def test_an_output_between_keeps_its_value():
    _, operators = optimized(
        """(float[n, 3, 5, 5] x) => (float[n, 4, 5, 5] c, float[n, 4, 5, 5] y)
           { c = Conv(x, w) y = Mul(c, s) }""",
        {"w": W1, "s": np.float32(2)},
    )

    assert operators == ["Conv", "Mul"]


def test_a_weight_of_two_convs_is_left_alone():
    _, operators = optimized(
        """(float[n, 4, 5, 5] x) => (float[n, 4, 3, 3] y, float[n, 4, 2, 2] z)
           { c = Conv(x, w) y = Mul(c, s) z = Conv<strides = [2, 2]>(x, w) }""",
        {"w": W3, "s": np.float32(2)},
    )

    assert operators == ["Conv", "Mul", "Conv"]


@pytest.mark.parametrize(
    ("scale", "operators"),
    [([0.5, 2, 3, 1.5], ["Conv", "Relu"]), ([0.5, 2, -3, 1.5], ["Conv", "Relu", "Mul"]),
     ([0.5, 0, 3, 1.5], ["Conv", "Relu", "Mul"])],
)  # fmt: skip
def test_only_positive_scales_pass_a_relu(scale, operators):
    _, found = optimized(
        """(float[n, 3, 5, 5] x) => (float[n, 4, 5, 5] y)
           { c = Conv(x, w) r = Relu(c) y = Mul(r, s) }""",
        {"w": W1, "s": np.float32(scale).reshape(4, 1, 1)},
    )

    assert found == operators


def test_a_norm_goes_through_a_pool_into_the_conv():
    _, operators = optimized(
        """(float[n, 3, 6, 6] x) => (float[n, 4, 3, 3] y)
           { c = Conv(x, w)
             p = AveragePool<kernel_shape = [2, 2], strides = [2, 2]>(c)
             y = BatchNormalization(p, g, b, m, v) }""",
        {"w": W1, "g": FOUR, "b": B, "m": B, "v": FOUR},
    )

    assert operators == ["Conv", "AveragePool"]


@pytest.mark.parametrize(
    ("pool", "sign", "left"),
    [
        ("GlobalAveragePool", -1, ["Conv", "GlobalAveragePool"]),
        ("AveragePool<kernel_shape = [2, 2]>", -1, ["Conv", "AveragePool"]),
        ("MaxPool<kernel_shape = [2, 2], pads = [1, 1, 0, 0]>", 1, ["Conv", "MaxPool"]),
        ("GlobalMaxPool", -1, ["Conv", "GlobalMaxPool", "BatchNormalization"]),
        ("MaxPool<kernel_shape = [2, 2]>", -1, ["Conv", "MaxPool", "BatchNormalization"]),
    ],
)
def test_a_norm_passes_a_mean_whatever_its_sign_and_a_maximum_if_it_is_positive(pool, sign, left):
    scale = np.float32([0.5, 1.5, 2, 1])
    scale[2] *= sign
    norm = {"g": scale, "b": np.float32([1, -1, 0, 2]), "m": scale / 3, "v": np.abs(scale)}

    _, operators = optimized(
        f"""(float[n, 4, 6, 6] x) => (float[n, 4, h, w] y)
            {{ c = Conv(x, w) p = {pool}(c) y = BatchNormalization(p, g, b, m, v) }}""",
        {"w": W3, **norm},
    )

    assert operators == left


def test_a_norm_before_two_convs_goes_into_both():
    _, operators = optimized(
        """(float[n, 4, 6, 6] x) => (float[n, 4, 4, 4] y, float[n, 4, 4, 4] z)
           { r = BatchNormalization(x, g, b, m, v) y = Conv(r, w) z = Conv<group = 4>(r, d) }""",
        {"w": W3, "d": DEPTHWISE, "g": FOUR, "b": B, "m": B, "v": FOUR},
    )

    assert operators == ["Conv", "Conv"]


def test_a_shift_stays_before_a_conv_that_pads():
    """Padding is zero behind the Add; before it, it would have to be -t."""
    _, operators = optimized(
        """(float[n, 4, 6, 6] x) => (float[n, 4, 6, 6] y)
           { r = Relu(x) m = Mul(r, s) a = Add(m, t) y = Conv<pads = [1, 1, 1, 1]>(a, w) }""",
        {"w": W3, "s": np.float32(2), "t": np.float32(0.5)},
    )

    assert operators == ["Relu", "Add", "Conv"]


def test_a_branch_of_a_concat_goes_into_the_conv_behind():
    _, operators = optimized(
        """(float[n, 2, 6, 6] x) => (float[n, 4, 4, 4] y)
           { r = Relu(x) m = Mul(r, s) a = Add(m, t) k = Concat<axis = 1>(a, x) y = Conv(k, w) }""",
        {"w": W3, "s": np.float32(2), "t": np.float32(0.5)},
    )

    assert operators == ["Relu", "Concat", "Conv"]


def test_every_branch_of_a_concat_takes_its_share_of_a_norm():
    _, operators = optimized(
        """(float[n, 3, 5, 5] x) => (float[n, 4, 5, 5] y)
           { a = Conv(x, w) b = Conv(x, u) k = Concat<axis = 1>(a, b)
             y = BatchNormalization(k, g, t, m, v) }""",
        {"w": W1[:1], "u": W1[1:], "g": FOUR, "t": B, "m": B, "v": FOUR},
    )

    assert operators == ["Conv", "Conv", "Concat"]


def test_a_flattened_channel_goes_into_a_gemm():
    weight = RNG.standard_normal((16, 5)).astype(np.float32)

    _, operators = optimized(
        """(float[n, 4, 2, 2] x) => (float[n, 5] y)
           { r = BatchNormalization(x, g, b, m, v) f = Flatten<axis = 1>(r) y = Gemm(f, w) }""",
        {"w": weight, "g": FOUR, "b": B, "m": B, "v": FOUR},
    )

    assert operators == ["Flatten", "Gemm"]


def test_a_matmul_takes_the_scale_and_one_add_stays():
    weight = RNG.standard_normal((4, 5)).astype(np.float32)

    found, operators = optimized(
        """(float[n, 3, 4] x) => (float[n, 3, 5] y)
           { m = MatMul(x, w) a = Add(m, b) y = Mul(a, s) }""",
        {"w": weight, "b": np.arange(5, dtype=np.float32), "s": np.float32(3)},
    )

    assert operators == ["MatMul", "Add"]
    assert found.names == {"y": "m"}


def test_alpha_and_beta_of_a_gemm_count():
    weight = RNG.standard_normal((5, 4)).astype(np.float32)

    _, operators = optimized(
        """(float[n, 4] x) => (float[n, 5] y)
           { a = Add(x, t)
             g = Gemm<alpha = 0.5, beta = 2.0, transB = 1>(a, w, b)
             y = Mul(g, s) }""",
        {"w": weight, "b": np.arange(5, dtype=np.float32), "s": np.float32(3), "t": B},
    )

    assert operators == ["Gemm"]


def test_a_chain_becomes_one_mul_and_one_add():
    found, operators = optimized(
        """(float[n, 4] x) => (float[n, 4] y)
           { a = Add(x, s) b = Mul(a, s) c = Sub(t, b) d = Div(c, s) y = Tanh(d) }""",
        {"s": np.float32(2), "t": B},
    )

    assert operators == ["Mul", "Add", "Tanh"]
    assert set(found.names) <= {"a", "b", "c", "d"}


def test_a_constant_that_widens_its_operand_is_no_scale():
    _, operators = optimized(
        """(float[n, 1, 5, 5] x) => (float[n, 4, 5, 5] y)
           { m = Mul(x, s) y = Conv<group = 4, kernel_shape = [1, 1]>(m, w) }""",
        {"w": W1[:, :1], "s": FOUR.reshape(4, 1, 1)},
    )

    assert operators == ["Mul", "Conv"]


def test_numbers_for_columns_are_no_numbers_for_channels():
    _, operators = optimized(
        """(float[n, 3, 4, 4] x) => (float[n, 4, 4, 4] y)
           { c = Conv(x, w) y = Mul(c, s) }""",
        {"w": W1, "s": FOUR},
    )

    assert operators == ["Conv", "Mul"]


def test_a_branch_that_reads_a_tensor_sees_it_unchanged():
    _, operators = optimized(
        """(float[n, 3, 4, 4] x, bool p) => (float[n, 4, 4, 4] y)
           { c = Conv(x, w) m = Mul(c, s)
             y = If(p) <
               then_branch = g1 () => (float[n, 4, 4, 4] u) { u = Relu(m) },
               else_branch = g2 () => (float[n, 4, 4, 4] v) { v = Add(c, m) } > }""",
        {"w": W1, "s": np.float32(2)},
    )

    assert operators == ["Conv", "Mul", "If"]


@pytest.mark.parametrize("gate", ["e = Erf(d) g = Add(e, one)", "e = Tanh(d) g = Add(one, e)"])
def test_the_factor_of_a_gelu_stays_where_onnxruntime_looks_for_it(gate):
    weight = RNG.standard_normal((4, 5)).astype(np.float32)

    _, operators = optimized(
        f"""(float[n, 4] x) => (float[n, 5] y)
            {{ d = Div(x, r) {gate} m = Mul(x, g) h = Mul(m, s) y = MatMul(h, w) }}""",
        {"w": weight, "r": np.float32(2**0.5), "one": np.float32(1), "s": np.float32(0.5)},
    )

    assert operators.count("Mul") == 2


def test_the_nodes_that_are_left_of_a_chain_have_names_of_their_own():
    found, operators = optimized(
        """(float[n, 3] x) => (float[n, 3] y)
           { d = Div(x, c) e = Sub(one, d) y = Mul(e, t) }""",
        {"c": np.float32(2), "one": np.float32(1), "t": np.float32([1, 2, 3])},
    )

    assert operators == ["Mul", "Add"]
    assert len({node.name for node in found.model.graph}) == 2


def test_a_sum_of_two_tensors_is_an_add():
    _, operators = optimized(
        """(float[n, 4, 5, 5] x) => (float[n, 4, 5, 5] y)
           { r = Relu(x) c = Conv(x, w) d = Sum(c, t) y = Sum(d, r) }""",
        {"w": RNG.standard_normal((4, 4, 1, 1)).astype(np.float32), "t": np.float32(2)},
    )

    assert operators == ["Relu", "Conv", "Add"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("(float[n] x) => (float[n] y) { r = Relu(x) y = Add(r, nought) }", ["Relu"]),
        ("(float[n] x) => (float[n] y) { y = Add(x, nought) }", ["Add"]),
        ("(float[n] x) => (float[n] y, float[n] r) { r = Relu(x) y = Add(r, nought) }", None),
    ],
)
def test_an_output_that_nothing_is_done_for_is_what_it_would_be_made_of(text, expected):
    _, operators = optimized(text, {"nought": np.zeros(1, np.float32)})

    assert operators == (expected or ["Relu", "Add"])

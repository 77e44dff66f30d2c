"""Which integers stand for a weight."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx_ir import AttrInt64, Node

from quant_core.numerics.saturation import unsafe_pairs
from quant_core.numerics.weights import (
    BLOCK_MIN,
    Layout,
    block_width,
    layout_of,
    quantize_int4,
    quantize_int8,
)

SEEDS = range(12)


def matrix(seed: int) -> np.ndarray:
    """Rows of different sizes and tails; one of zeros, one of a single weight, one tiny."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_t(4, (8, int(rng.integers(1, 50)))) * 10.0 ** rng.integers(-4, 4, (8, 1))
    rows[0], rows[1], rows[1, -1], rows[2] = 0, 0, 3.5, rows[2] * 1e-30
    return rows.astype(np.float32)


@pytest.mark.parametrize("method", ["rtn", "mse", "auto"])
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("seed", SEEDS)
def test_int8_weights_that_are_to_be_safe_are_proven_safe(seed, per_channel, method):
    found = quantize_int8(matrix(seed), per_channel=per_channel, safe=True, method=method)

    assert len(unsafe_pairs(found.q)) == 0
    assert found.scale.shape == ((8,) if per_channel else ())


@pytest.mark.parametrize("seed", SEEDS)
def test_rounding_to_nearest_errs_by_half_a_step_at_most(seed):
    rows = matrix(seed)

    found = quantize_int8(rows, method="rtn")

    assert np.abs(found.q).max() <= 127
    assert np.all(np.abs(rows - found.values) <= found.scale[:, None] * (0.5 + 1e-5))


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("seed", SEEDS)
def test_the_search_for_a_scale_never_loses_to_rounding_at_the_plain_one(seed, safe):
    rows = matrix(seed)

    plain, found = (quantize_int8(rows, safe=safe, method=method) for method in ("rtn", "mse"))

    errors = [np.square(rows - w.values, dtype=np.float64).sum(1) for w in (found, plain)]
    assert np.all(errors[0] <= errors[1] * (1 + 1e-6))


@pytest.mark.parametrize("seed", SEEDS)
def test_safe_weights_lose_less_than_those_of_seven_bits(seed):
    rows = matrix(seed)
    halved = np.abs(rows).max(1, initial=0.0, keepdims=True) / 63
    seven_bits = np.rint(rows / np.where(halved > 0, halved, 1)) * halved

    found = quantize_int8(rows, safe=True).values

    assert (
        np.square(rows - found, dtype=np.float64).sum()
        <= np.square(rows - seven_bits, dtype=np.float64).sum() * 1.000001
    )


def test_a_row_of_zeros_has_scale_1():
    assert quantize_int8(matrix(0)).scale[0] == 1
    assert quantize_int4(matrix(0), 1).scale[0] == 1


@pytest.mark.parametrize(
    "quantize", [quantize_int8, lambda rows, **more: quantize_int4(rows, 1, **more)]
)
def test_scales_are_at_least_the_floor(quantize):
    rows = matrix(3)
    floor = np.geomspace(1e-6, 1e6, len(rows))

    assert np.all(quantize(rows, floor=floor).scale >= floor.astype(np.float32))


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("seed", SEEDS)
def test_int4_products_fit_their_types(seed, safe):
    rows = matrix(seed)
    block = block_width(rows.shape[1], 16)

    found = quantize_int4(rows, block, safe=safe)

    assert np.abs(found.blocks).max() <= 7
    assert 1 <= found.multipliers.min() <= found.multipliers.max() <= 15
    np.testing.assert_array_equal(
        found.q, found.blocks * np.repeat(found.multipliers, block, axis=1).astype(int)
    )
    assert not safe or len(unsafe_pairs(found.q)) == 0


@pytest.mark.parametrize("seed", SEEDS)
def test_each_int4_block_has_the_best_of_all_multipliers(seed):
    rows = matrix(seed)
    found = quantize_int4(rows, rows.shape[1])
    steps = rows / found.scale[:, None]

    every = [m * np.clip(np.rint(steps / np.float32(m)), -7, 7) for m in range(1, 16)]

    least = np.min([np.square(steps - q, dtype=np.float64).sum(1) for q in every], axis=0)
    np.testing.assert_allclose(
        np.square(steps - found.q, dtype=np.float64).sum(1), least, rtol=1e-3, atol=1e-6
    )


@given(st.integers(1, 3000), st.sampled_from([16, 32, 64, 128]))
def test_a_block_divides_the_columns_and_is_never_tiny(columns, wanted):
    width = block_width(columns, wanted)

    assert columns % width == 0
    assert width >= min(columns, BLOCK_MIN)


@pytest.mark.parametrize(
    ("columns", "width"), [(64, 32), (27, 27), (36, 36), (288, 32), (147, 21), (1031, 1031), (2, 2)]
)
def test_a_block_is_the_divisor_nearest_to_what_was_wanted(columns, width):
    assert block_width(columns, 32) == width


@pytest.mark.parametrize(
    ("op", "attributes", "shape", "rows"),
    [
        ("Conv", {}, (4, 3, 2, 5), (4, 30)),
        ("Conv", {}, (4, 3, 5), (4, 15)),
        ("ConvTranspose", {}, (4, 3, 2, 5), (3, 40)),
        ("Gemm", {}, (4, 3), (3, 4)),
        ("Gemm", {"transB": 1}, (4, 3), (4, 3)),
        ("MatMul", {}, (4, 3), (3, 4)),
        ("MatMul", {}, (2, 4, 3), (3, 8)),
        ("LSTM", {}, (2, 8, 3), (16, 3)),
        ("Gather", {}, (4, 3), (4, 3)),
    ],
)
def test_a_layout_and_its_inverse_give_the_weight_back(op, attributes, shape, rows):
    node = Node("", op, [], [AttrInt64(k, v) for k, v in attributes.items()])
    weight = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)

    layout = layout_of(node, len(shape))

    assert layout.matrix(weight).shape == rows
    np.testing.assert_array_equal(layout.tensor(layout.matrix(weight), shape), weight)
    per_row = np.arange(1, rows[0] + 1, dtype=np.float32)
    scaled = layout.tensor(layout.matrix(weight) * per_row[:, None], shape)
    np.testing.assert_array_equal(weight * layout.beside(per_row, shape), scaled)


def test_conv_columns_are_in_the_order_of_the_kernel_channels_last():
    weight = np.arange(8).reshape(1, 2, 2, 2)

    assert Layout((0, 2, 3, 1)).matrix(weight).tolist() == [[0, 4, 1, 5, 2, 6, 3, 7]]

"""Rounding to nearest errs as little as it can, and safe weights are proven safe."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quant_core.numerics.granularity import PerChannel, PerTensor
from quant_core.numerics.levels import EVEN, NORMAL
from quant_core.numerics.round_nearest import (
    BLOCK_MIN,
    block_width,
    quantize_int4,
    quantize_int8,
)
from quant_core.numerics.saturation import unsafe_pairs

SEEDS = range(12)
BOTH_LEVELS = pytest.mark.parametrize("levels", [EVEN, NORMAL], ids=["even", "normal"])


def matrix(seed: int) -> np.ndarray:
    """Rows of different sizes and tails; one of zeros, one of a single weight, one tiny."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_t(4, (8, int(rng.integers(1, 50)))) * 10.0 ** rng.integers(-4, 4, (8, 1))
    rows[0], rows[1], rows[1, -1], rows[2] = 0, 0, 3.5, rows[2] * 1e-30
    return rows.astype(np.float32)


@pytest.mark.parametrize("search_scale", [True, False])
@pytest.mark.parametrize("granularity", [PerChannel(), PerTensor()])
@pytest.mark.parametrize("seed", SEEDS)
def test_int8_weights_that_are_to_be_safe_are_proven_safe(seed, granularity, search_scale):
    found = quantize_int8(matrix(seed), granularity, pair_safe=True, search_scale=search_scale)

    assert len(unsafe_pairs(found.q)) == 0
    assert found.scale.shape == ((8,) if granularity == PerChannel() else ())


@pytest.mark.parametrize("seed", SEEDS)
def test_rounding_to_nearest_errs_by_half_a_step_at_most(seed):
    rows = matrix(seed)

    found = quantize_int8(rows, search_scale=False)

    assert np.abs(found.q).max() <= 127
    assert np.all(np.abs(rows - found.values) <= found.scale[:, None] * (0.5 + 1e-5))


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("seed", SEEDS)
def test_the_search_for_a_scale_never_loses_to_rounding_at_the_plain_one(seed, safe):
    rows = matrix(seed)

    plain, found = (
        quantize_int8(rows, pair_safe=safe, search_scale=search) for search in (False, True)
    )

    errors = [np.square(rows - w.values, dtype=np.float64).sum(1) for w in (found, plain)]
    assert np.all(errors[0] <= errors[1] * (1 + 1e-6))


@pytest.mark.parametrize("seed", SEEDS)
def test_safe_weights_lose_less_than_those_of_seven_bits(seed):
    rows = matrix(seed)
    halved = np.abs(rows).max(1, initial=0.0, keepdims=True) / 63
    seven_bits = np.rint(rows / np.where(halved > 0, halved, 1)) * halved

    found = quantize_int8(rows, pair_safe=True).values

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


@BOTH_LEVELS
@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("seed", SEEDS)
def test_int4_levels_fit_their_types(seed, safe, levels):
    rows = matrix(seed)
    block = block_width(rows.shape[1], 16)

    found = quantize_int4(rows, block, pair_safe=safe, levels=levels)

    assert -8 <= found.blocks.min() <= found.blocks.max() <= 7
    assert 1 <= found.multipliers.min() <= found.multipliers.max() <= 15
    multipliers = np.repeat(found.multipliers, block, axis=1)
    np.testing.assert_array_equal(found.q, levels.table[multipliers, found.blocks + 8])
    assert not safe or len(unsafe_pairs(found.q)) == 0


@BOTH_LEVELS
def test_safe_pairs_cost_little_in_four_bits(levels):
    rows = np.random.default_rng(0).standard_normal((64, 256)).astype(np.float32)

    free, safe = (
        np.square(rows - quantize_int4(rows, 32, pair_safe=is_safe, levels=levels).values).sum()
        for is_safe in (False, True)
    )

    assert 10 * np.log10(safe / free) < 0.3  # 0.9 dB with the finest scale


@pytest.mark.parametrize("seed", SEEDS)
def test_each_int4_block_has_the_best_of_all_multipliers(seed):
    rows = matrix(seed)
    found = quantize_int4(rows, rows.shape[1])
    steps = rows / found.scale[:, None]

    every = [m * np.clip(np.rint(steps / np.float32(m)), -8, 7) for m in range(1, 16)]

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

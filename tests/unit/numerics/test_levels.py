"""Looked-up levels are the nearest ones, and uneven ones are those that serve normal weights."""

from __future__ import annotations

import numpy as np
import pytest

from quant_core.numerics.levels import EVEN, MULTIPLIER_MAX, NORMAL
from quant_core.numerics.round_nearest import fitting_levels, quantize_int4

BOTH = pytest.mark.parametrize("levels", [EVEN, NORMAL], ids=["even", "normal"])
MULTIPLIERS = np.arange(1, MULTIPLIER_MAX + 1)[:, None]


def test_even_levels_are_products():
    np.testing.assert_array_equal(EVEN.table[1:], MULTIPLIERS * np.arange(-8, 8))


@BOTH
def test_they_ascend_with_a_zero_at_the_integer_0(levels):
    assert (np.diff(levels.table.astype(int)) >= 0).all()
    assert (levels.table[:, 8] == 0).all()


@BOTH
def test_no_level_is_nearer_than_the_nearest(levels):
    steps = np.random.default_rng(0).uniform(-150, 150, (1, 5000)).astype(np.float32)

    found = levels.nearest(steps, MULTIPLIERS)

    least = np.abs(levels.table[1:, None, :] - steps[..., None]).min(2)
    np.testing.assert_array_equal(np.abs(found - steps), least)


@BOTH
def test_levels_within_bounds_are_the_nearest_of_those_within(levels):
    rng = np.random.default_rng(0)
    steps = rng.uniform(-150, 150, (1, 2000)).astype(np.float32)
    low, high = -rng.integers(0, 128, steps.shape), rng.integers(0, 128, steps.shape)
    bounds = low.astype(np.float32), high.astype(np.float32)

    found = levels.within(levels.nearest(steps, MULTIPLIERS), *bounds, MULTIPLIERS)

    each = np.broadcast_to(levels.table[1:, None, :], (MULTIPLIER_MAX, 2000, 16)).astype(float)
    distance = np.abs(each - steps[..., None])
    distance[(each < low[..., None]) | (each > high[..., None])] = np.inf
    np.testing.assert_allclose(np.abs(found - steps), distance.min(2), rtol=1e-6)
    assert ((found >= low) & (found <= high)).all()


@BOTH
def test_integers_of_levels_make_them_again(levels):
    integers = np.arange(-8, 8, dtype=np.int8)[None]

    made = levels.of(integers, MULTIPLIERS)

    np.testing.assert_array_equal(made, levels.table[1:])
    np.testing.assert_array_equal(levels.of(levels.integers(made, MULTIPLIERS), MULTIPLIERS), made)


def test_normal_levels_are_means_of_the_normal_numbers_nearest_to_them():
    """As in Lloyd's iteration once it stands still: an int8 table shows it to a fifteenth."""
    rows = np.random.default_rng(0).standard_normal((2000, 320)).astype(np.float32)
    found = quantize_int4(rows, 32, levels=NORMAL)
    size = found.scale[:, None] * found.multipliers.repeat(32, axis=1).astype(float)

    for integer, level in zip(range(-8, 8), NORMAL.table[MULTIPLIER_MAX] / 15, strict=True):
        here = found.blocks == integer
        mean = np.average((rows / size)[here], weights=np.square(size[here]))
        assert abs(mean - level) < 1 / 15, integer


@pytest.mark.parametrize(
    ("rows", "fitting"),
    [
        (np.random.default_rng(0).standard_normal((64, 256)), NORMAL),
        (np.random.default_rng(0).uniform(-1, 1, (64, 256)), EVEN),
        (np.random.default_rng(0).integers(-8, 8, (64, 256)), EVEN),
    ],
    ids=["normal", "uniform", "integers"],
)
def test_levels_are_chosen_by_how_weights_are_distributed(rows, fitting):
    assert fitting_levels(rows.astype(np.float32), 32) is fitting


def test_normal_levels_gain_on_normal_weights():
    rows = np.random.default_rng(1).standard_normal((64, 256)).astype(np.float32)

    even, normal = (
        np.square(quantize_int4(rows, 32, levels=levels).values - rows).sum()
        for levels in (EVEN, NORMAL)
    )

    assert 10 * np.log10(even / normal) > 0.6

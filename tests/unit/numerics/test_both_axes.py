"""Integers of one scale serve the rows and the columns of a matrix, and saturate along neither."""

from __future__ import annotations

import numpy as np
import pytest

from quant_core.numerics.both_axes import least_db_of_both_axes, quantize_both_axes
from quant_core.numerics.saturation import unsafe_pairs


@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (5, 7), (64, 33), (0, 4)])
@pytest.mark.parametrize("seed", range(3))
def test_no_pair_along_either_axis_can_saturate(shape, seed):
    matrix = np.random.default_rng(seed).laplace(size=shape).astype(np.float32)

    found = quantize_both_axes(matrix, pair_safe=True)

    assert not len(unsafe_pairs(found.q))
    assert not len(unsafe_pairs(found.q.T))
    # a half by rounding, and one more where a pair is still beyond the limit
    assert (np.abs(found.values - matrix) <= 1.501 * found.scale).all()


def test_without_saturation_the_largest_weight_has_the_largest_integer():
    matrix = np.array([[1.0, -2.0], [2.0, 0.5]], np.float32)

    found = quantize_both_axes(matrix, pair_safe=False)

    assert np.abs(found.q).max() == 127
    assert (np.abs(found.values - matrix) <= found.scale / 2 * 1.001).all()


@pytest.mark.parametrize("pair_safe", [True, False])
def test_the_noise_of_the_worst_row_or_column_is_foreseen(pair_safe):
    matrix = np.random.default_rng(0).normal(size=(256, 128)).astype(np.float32)
    matrix[:, 7] /= 16
    matrix[9] = 0

    foreseen = least_db_of_both_axes(matrix, pair_safe=pair_safe)

    column = matrix[:, 7]
    error = column - quantize_both_axes(matrix, pair_safe=pair_safe).values[:, 7]
    assert 10 * np.log10((column**2).sum() / (error**2).sum()) == pytest.approx(foreseen, abs=1.5)

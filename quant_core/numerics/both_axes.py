"""A matrix that products read along both of its axes, as they are and transposed: one scale, and
integers that are safe from saturation along each.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from quant_core.numerics.integer_weight import QMAX8, IntegerWeight
from quant_core.numerics.saturation import PAIR_LIMIT, make_safe


def quantize_both_axes(matrix: NDArray[np.float32], *, pair_safe: bool) -> IntegerWeight:
    """int8 of the shape of the matrix, with a scale (): the nearest integers on the grid of
    `scale_of_both_axes`.

    pair_safe  no pair of neighbours can saturate int16 (saturation.py), along either axis
    """
    scale = scale_of_both_axes(matrix, pair_safe=pair_safe)
    q = np.clip(np.rint(matrix / scale), -QMAX8, QMAX8).astype(np.int8)
    if pair_safe:  # rounding may leave a pair at 129; what one axis makes smaller stays safe
        of_columns = make_safe(np.ascontiguousarray(make_safe(q).T))
        q = np.ascontiguousarray(of_columns.T)
    return IntegerWeight(q, scale)


def scale_of_both_axes(matrix: NDArray[np.float32], *, pair_safe: bool) -> NDArray[np.float32]:
    """(): the least scale at which nothing is clipped, and no pair has to be made smaller."""
    scale = np.abs(matrix).max(initial=0.0) / QMAX8
    if pair_safe:  # of unlike signs, a pair is no larger than one of its weights
        rows, columns = (size // 2 * 2 for size in matrix.shape)
        down = np.abs(matrix[0:rows:2] + matrix[1:rows:2]).max(initial=0.0)
        along = np.abs(matrix[:, 0:columns:2] + matrix[:, 1:columns:2]).max(initial=0.0)
        scale = max(scale, down / PAIR_LIMIT, along / PAIR_LIMIT)
    return np.asarray(max(scale, np.finfo(np.float32).tiny), np.float32)


def least_db_of_both_axes(matrix: NDArray[np.float32], *, pair_safe: bool) -> float:
    """Signal to rounding noise of the row or column that one scale serves worst, in dB; inf without
    one. Those that are all zeros stay so.
    """
    steps = matrix / scale_of_both_axes(matrix, pair_safe=pair_safe)
    np.square(steps, out=steps)
    means = np.concatenate([steps.mean(0), steps.mean(1)])
    least = means[means > 0].min(initial=np.inf)
    return float(10 * np.log10(12 * least))  # a step has noise of 1 / 12

"""Coordinate descent over the integers of a weight in blocks of 4 bits."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from quant_core.numerics.column_bounds import Signs, safe_range
from quant_core.numerics.levels import Levels
from quant_core.numerics.output_noise import damped, damping_of
from quant_core.numerics.sweep import STEP, STRIPE

DESCENTS = 2  # passes over all columns, after which hardly an integer changes


def descend(
    rows: NDArray[np.float32],
    product: NDArray[np.int8],
    multipliers: NDArray[np.uint8],
    scale: NDArray[np.float32],
    gram: NDArray[Any],
    levels: Levels,
    *,
    pair_safe: bool,
) -> tuple[NDArray[np.int8], NDArray[np.float64]]:
    """The integers after coordinate descent, and the output noise (C,) of each row: each integer in
    turn is set to the level at which the error is least, all others fixed.

    multipliers  of each integer's block, (C, K)

    Source: Behdin et al. 2023, QuantEase (arXiv 2309.01885), algorithm 1.
    """
    groups, parts, k, _ = gram.shape
    signs = Signs(rows)
    out = product.astype(np.float32)
    # as in Factor: directions in which no input was seen must not drift
    damping = damping_of(gram)
    matrices = damped(gram, damping)
    each = rows.reshape(groups, -1, rows.shape[1])
    q, m = out.reshape(each.shape), multipliers.reshape(each.shape)
    s = scale.reshape(groups, -1)
    noise = np.zeros(s.shape)
    for g, p in np.ndindex(groups, parts):
        matrix = matrices[g, p]
        part = slice(p * k, p * k + k)
        of_group = slice(g * each.shape[1], (g + 1) * each.shape[1])
        steps, exact = (np.ascontiguousarray(x[g, :, part].T) for x in (q, each))
        sizes = np.ascontiguousarray(m[g, :, part].T)
        slope = matrix @ (exact - steps * s[g])  # (k, rows); the matrix is symmetric

        for first in [*range(0, k, STRIPE)] * DESCENTS:
            stripe = slice(first, min(first + STRIPE, k))
            before = steps[stripe].copy()
            for few in range(first, stripe.stop, STEP):
                now = slice(few, min(few + STEP, stripe.stop))
                before_now = steps[now].copy()
                for j in range(k)[now]:
                    if matrix[j, j] <= 0:
                        continue
                    optimum = steps[j] + slope[j] / (matrix[j, j] * s[g])
                    found = levels.nearest(optimum, sizes[j])
                    if pair_safe and j ^ 1 < k:
                        found = levels.within(found, *safe_range(steps[j ^ 1]), sizes[j])
                    found = signs.keep(found, p * k + j, of_group)
                    slope[now] -= matrix[now, j, None] * ((found - steps[j]) * s[g])
                    steps[j] = found
                change = (steps[now] - before_now) * s[g]
                _pass_on(change, now, matrix, slope, first, stripe.stop)
            _pass_on((steps[stripe] - before) * s[g], stripe, matrix, slope, 0, k)
        q[g, :, part] = steps.T
        left = exact - steps * s[g]
        noise[g] += (left * (slope - damping[g, p] * left)).sum(0, dtype=np.float64)
    return out.astype(np.int8), noise.reshape(-1)


def _pass_on(
    change: NDArray[Any],
    done: slice,
    matrix: NDArray[Any],
    slope: NDArray[Any],
    first: int,
    last: int,
) -> None:
    """Edit in place: the slopes of columns from `first` to `last` follow a change of those that are
    done, whose own have followed.
    """
    for rest in (slice(first, done.start), slice(done.stop, last)):
        slope[rest] -= matrix[rest, done] @ change

"""Rounding in which each column makes up for the errors of the columns before it.

Source: Frantar et al. 2022, GPTQ (arXiv 2210.17323), algorithm 1, without reordering: neighbours must stay neighbours,
so that the pair rule of saturation.py can be kept on the way (the later of two takes what the earlier one left).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quant_core.saturation import PAIR_LIMIT
from quant_core.weights import MULTIPLIER_MAX, QMAX4, QMAX8, IntegerWeight, quantize_int4, quantize_int8

DAMPING = 0.01  # of the mean diagonal, so that the Gram matrix can be inverted
STRIPE = 64  # columns after which the rest of the matrix is updated at once


def gptq_int8(
    rows: NDArray[np.float32], gram: NDArray[Any], *, per_channel: bool = True, safe: bool = False, floor: Any = 0.0
) -> IntegerWeight:
    """int8 rows (C, K) with less error in the outputs than rounding to nearest, judged by the Gram matrices.

    gram  (G, P, k, k), the inputs' second moments in each of G groups of C / G rows, in P parts of k of the K columns
    Of the finest scale and, if safe, coarser ones up to that at which every pair is safe, each row takes the one with
    the least error; a row that nearest rounding serves better keeps it. Never worse than `quantize_int8` by the Gram.
    """
    nearest = quantize_int8(rows, per_channel=per_channel, safe=safe, floor=floor)
    widest = _row_scale(nearest, len(rows))
    finest = np.maximum(np.maximum(np.abs(rows).max(1, initial=0.0) / QMAX8, floor), np.finfo(np.float32).tiny)
    scales = [widest]
    if per_channel and safe:
        scales += [np.minimum(s, widest).astype(np.float32) for s in (np.sqrt(finest * widest.astype(float)), finest)]
    factor = _factor(gram)
    q, scale, error = nearest.q.copy(), widest.copy(), _errors(rows, nearest.values, gram)
    for candidate in scales:

        def at(j: int, column: NDArray[Any], left: NDArray[Any] | None, candidate: Any = candidate) -> tuple[Any, Any]:
            steps = np.clip(np.rint(column / candidate), -QMAX8, QMAX8)
            if safe and left is not None:
                steps = np.clip(
                    steps, np.where(left < 0, -PAIR_LIMIT - left, -QMAX8), np.where(left > 0, PAIR_LIMIT - left, QMAX8)
                )
            return steps, steps * candidate

        found = _sweep(rows, factor, at)
        found_error = _errors(rows, found * candidate[:, None], gram)
        better = found_error < error
        if not per_channel:
            better[:] = found_error.sum() < error.sum()
        q[better], scale[better], error[better] = found[better].astype(np.int8), candidate[better], found_error[better]
    return IntegerWeight(q, scale if per_channel else scale[0])


def gptq_int4(
    rows: NDArray[np.float32], gram: NDArray[Any], block: int, *, safe: bool = False, floor: Any = 0.0
) -> IntegerWeight:
    """int4 in blocks, as `quantize_int4` stores them; each block's multiplier is chosen when its turn comes."""
    nearest = quantize_int4(rows, block, safe=safe, floor=floor)
    scale = _row_scale(nearest, len(rows))
    multipliers = np.ones((len(rows), rows.shape[1] // block), np.uint8)
    weight = np.einsum("gpkk->gpk", gram).reshape(len(gram), -1).repeat(len(rows) // len(gram), axis=0)

    def start(j: int, ahead: NDArray[Any]) -> None:
        multipliers[:, j // block] = _best_multiplier(ahead / scale[:, None], weight[:, j : j + block])

    def at(j: int, column: NDArray[Any], left: NDArray[Any] | None) -> tuple[Any, Any]:
        m = multipliers[:, j // block].astype(np.float32)
        steps = np.clip(np.rint(column / (scale * m)), -QMAX4, QMAX4)
        if safe and left is not None:
            room = np.where(left > 0, PAIR_LIMIT - left, np.inf), np.where(left < 0, -PAIR_LIMIT - left, -np.inf)
            steps = np.clip(steps, np.ceil(room[1] / m), np.floor(room[0] / m))
        return steps * m, steps * m * scale

    product = _sweep(rows, _factor(gram), at, start, block)
    error, nearest_error = (_errors(rows, p * scale[:, None], gram) for p in (product, nearest.q.astype(np.float32)))
    worse = error > nearest_error
    assert nearest.multipliers is not None
    product[worse], multipliers[worse] = nearest.q[worse], nearest.multipliers[worse]
    blocks = (product / np.repeat(multipliers, block, axis=1)).astype(np.int8)
    return IntegerWeight(product.astype(np.int8), scale, blocks, multipliers)


def _sweep(
    rows: NDArray[np.float32], factor: NDArray[Any], at: Callable[..., tuple[Any, Any]],
    start: Callable[[int, NDArray[Any]], None] | None = None, block: int = 1,
) -> NDArray[np.float32]:  # fmt: skip
    """The integers (C, K) of all columns, from left to right.

    at     (j, column, left) -> the column's integers and their values; `left` is the even neighbour of an odd column
    start  sees, before the first column j of a block, what the columns from j on have become
    """
    _, parts, columns, _ = factor.shape
    out = [
        _sweep_part(rows[:, p * columns : (p + 1) * columns], factor[:, p], p * columns, at, start, block)
        for p in range(parts)
    ]
    return np.concatenate(out, axis=1)


def _sweep_part(
    rows: NDArray[np.float32], factor: NDArray[Any], offset: int, at: Any, start: Any, block: int
) -> NDArray[np.float32]:
    """The integers of one part, whose first column is number `offset`; even, so that no pair is cut."""
    groups, columns = len(factor), rows.shape[1]
    stripe = block * max(1, STRIPE // block)
    rest = rows.astype(np.float32).reshape(groups, -1, columns).copy()
    out = np.empty((columns, len(rows)), np.float32)
    for first in range(0, columns, stripe):
        last = min(first + stripe, columns)
        mine = np.ascontiguousarray(rest[:, :, first:last].transpose(2, 0, 1))  # a column is contiguous
        errors = np.empty_like(mine)
        for j in range(first, last):
            if start is not None and j % block == 0:
                start(offset + j, mine[j - first : j - first + block].reshape(-1, len(rows)).T)
            column = mine[j - first]
            steps, values = at(offset + j, column.reshape(-1), out[j - 1] if j % 2 else None)
            out[j] = steps
            error = (column - values.reshape(column.shape)) / factor[:, j, j, None]
            mine[j - first + 1 :] -= factor[:, j, j + 1 : last].T[:, :, None] * error
            errors[j - first] = error
        if last < columns:
            rest[:, :, last:] -= errors.transpose(1, 2, 0) @ factor[:, first:last, last:]
    return np.ascontiguousarray(out.T)


def _factor(gram: NDArray[Any], times: float = 1.0) -> NDArray[np.float32]:
    """Upper Cholesky factor of the inverse of each damped Gram matrix: (G, P, k, k)."""
    damped = gram.reshape(-1, *gram.shape[2:]).astype(np.float64)
    mean = np.einsum("gkk->gk", damped).mean(1, keepdims=True)
    diagonal = np.arange(damped.shape[1])
    damped[:, diagonal, diagonal] += np.where(mean > 0, times * DAMPING * mean, 1.0)
    try:
        inverse = np.linalg.inv(damped)
        lower = np.linalg.cholesky((inverse + inverse.transpose(0, 2, 1)) / 2)
    except np.linalg.LinAlgError:  # fewer samples than columns, all nearly equal
        return _factor(gram, 10 * times)
    return np.ascontiguousarray(lower.transpose(0, 2, 1)).astype(np.float32).reshape(gram.shape)


def _errors(rows: NDArray[Any], values: NDArray[Any], gram: NDArray[Any]) -> NDArray[np.float64]:
    """Per row, the expected squared error of its output."""
    groups, parts, columns, _ = gram.shape
    d = (rows - values).reshape(groups, -1, parts, columns).transpose(0, 2, 1, 3).astype(np.float32)
    return np.asarray(np.einsum("gpok,gpok->go", d @ gram.astype(np.float32), d, dtype=np.float64)).reshape(-1)


def _best_multiplier(grouped: NDArray[Any], weight: NDArray[Any]) -> NDArray[np.uint8]:
    """Per row, the multiplier with the least weighted squared error of one block (C, block)."""
    least, best = np.full(len(grouped), np.inf), np.ones(len(grouped), np.uint8)
    for m in range(1, MULTIPLIER_MAX + 1):
        d = grouped - np.clip(np.rint(grouped / m), -QMAX4, QMAX4) * m
        error = np.einsum("ck,ck,ck->c", d, d, weight)
        better = error < least
        least, best = np.where(better, error, least), np.where(better, np.uint8(m), best)
    return best


def _row_scale(weight: IntegerWeight, rows: int) -> NDArray[np.float32]:
    return np.ascontiguousarray(np.broadcast_to(weight.scale, (rows,)))

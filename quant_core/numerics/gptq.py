"""GPTQ: rounding in which each column makes up for the errors of the columns before it.

W (C, K) becomes Q with a small error tr((W - Q) H (W - Q)'), H = E[x x'] being the Gram matrix of
the inputs x.

Source: Frantar et al. 2022, GPTQ (arXiv 2210.17323), algorithm 1, without reordering: neighbours
must stay neighbours, so that the pair rule of saturation.py can be kept on the way (the later of
two takes what the earlier one left). Computed as Babai's nearest plane, which it equals (Chen et
al. 2025, arXiv 2507.18553): with H = R R' for an upper R and e_i = w_i - q_i the error of column i,
column j is rounded from its target w_j + sum over i < j of e_i R_ij / R_jj.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quant_core.numerics.granularity import Granularity, PerChannel, PerTensor
from quant_core.numerics.integer_weight import (
    MULTIPLIER_MAX,
    QMAX4,
    QMAX8,
    QMIN4,
    IntegerWeight,
    bfloat16,
)
from quant_core.numerics.round_nearest import quantize_int4, quantize_int8
from quant_core.numerics.saturation import PAIR_LIMIT

# Share of the mean diagonal that is added to it, so that H can be factored: the GPTQ paper's value.
DAMPING = 0.01
# Times DAMPING, where rounded rows are judged. As much as in the factor hides what GPTQ gains on
# many samples (python -m tests.bench.accuracy), a tenth what few do not show (test_gptq.py).
JUDGED_DAMPING = 0.5
# Of the finest scale of four bits: smaller ones clip the largest block, larger ones let more pairs
# be safe unreduced. Judge a change with `python -m tests.bench.int4`.
STRETCHES = (1.0, 0.8, 0.9, 1.07, 1.15)
SAFE_STRETCHES = (1.0, 0.9, 1.15, 1.35, 1.6)
DESCENTS = 2  # passes of QuantEase over all columns, after which hardly an integer changes
STRIPE = 64  # columns after which the rest of the matrix is updated at once: speed only
STEP = 8  # columns after which the rest of their stripe is updated at once: the same
SWEPT_VALUES = 1 << 20  # of all grids that are swept at once, if one alone has fewer: for memory
MAX_COLUMNS = 1536  # of one Gram matrix: factoring it takes the cube of that


def parts_of(columns: int) -> int:
    """P: into how many Gram matrices of equal, even width K columns are split; 0 where no such
    split exists.

    One matrix has at most MAX_COLUMNS columns. The width is even so that no pair of neighbours is
    in two of them.
    """
    least = -(-columns // MAX_COLUMNS)
    if least == 1:
        return 1
    for parts in range(least, columns):
        width, rest = divmod(columns, parts)
        if rest == 0 and width % 2 == 0:
            return parts
    return 0


def gptq_int8(
    rows: NDArray[np.float32],
    gram: NDArray[Any],
    granularity: Granularity = PerChannel(),  # noqa: B008  (frozen)
    *,
    pair_safe: bool = False,
    floor: Any = 0.0,
) -> IntegerWeight:
    """int8 rows (C, K) with less error in the outputs than rounding to nearest, judged by the Gram
    matrices.

    gram  H, (G, P, k, k): of the inputs of each of G groups of C / G rows, in P parts of k of the K
          columns
    Of the finest scale and, if `pair_safe`, coarser ones up to that at which every pair is safe,
    each row takes the one with the least error; a row that nearest rounding serves better keeps it.
    Never worse than `quantize_int8` by H, damped.
    """
    per_channel = granularity != PerTensor()
    nearest = quantize_int8(rows, granularity, pair_safe=pair_safe, floor=floor)
    widest = _row_scale(nearest, len(rows))
    finest = np.maximum(
        np.maximum(np.abs(rows).max(1, initial=0.0) / QMAX8, floor), np.finfo(np.float32).tiny
    )
    scales = [widest]
    if per_channel and pair_safe:
        scales += [
            np.minimum(s, widest).astype(np.float32)
            for s in (np.sqrt(finest * widest.astype(float)), finest)
        ]
    factor = _factor(gram)
    judged = judged_moments(gram)
    q, scale, error = nearest.q.copy(), widest.copy(), output_noise(rows, nearest.values, judged)
    together = max(1, SWEPT_VALUES // max(1, rows.size))
    for first in range(0, len(scales), together):
        some = np.stack(scales[first : first + together])
        swept = _int8_sweep(rows, factor, some, pair_safe=pair_safe)
        for candidate, found in zip(some, swept, strict=True):
            found_error = output_noise(rows, found * candidate[:, None], judged)
            better = found_error < error
            if not per_channel:
                better[:] = found_error.sum() < error.sum()
            q[better], scale[better], error[better] = (
                found[better].astype(np.int8),
                candidate[better],
                found_error[better],
            )
    return IntegerWeight(q, scale if per_channel else scale[0])


def output_noise(
    rows: NDArray[Any], values: NDArray[Any], gram: NDArray[Any] | None
) -> NDArray[np.float64]:
    """(C,): per row, the mean squared error of its output where `values` stand for it.

    rows, values  (C, K)
    gram          H, (G, P, k, k), second moments of the inputs; None if nothing is known of them:
                  then it is the identity, as for independent inputs of one size

    With values of 0 it is the row's signal.
    """
    d = (rows - values).astype(np.float32, copy=False)
    if gram is None:
        return np.asarray(np.einsum("ck,ck->c", d, d, dtype=np.float64))
    groups, parts, columns, _ = gram.shape
    d = d.reshape(groups, -1, parts, columns).transpose(0, 2, 1, 3)
    return np.asarray(
        np.einsum("gpok,gpok->go", d @ gram.astype(np.float32, copy=False), d, dtype=np.float64)
    ).reshape(-1)


def judged_moments(gram: NDArray[Any]) -> NDArray[np.float32]:
    """H by which rounded rows are judged: H of few samples sees no error where no input was."""
    return _damped(gram, JUDGED_DAMPING)


def _int8_sweep(
    rows: NDArray[np.float32],
    factor: NDArray[Any],
    scales: NDArray[np.float32],
    *,
    pair_safe: bool,
) -> NDArray[np.float32]:
    """The integers (S, C, K) of all columns on the grids of S scales (S, C) of each row.

    All grids are swept at once: on small weights, calls of numpy take longer than arithmetic.
    """
    groups = len(factor)
    shape = (groups, len(scales), len(rows) // groups, rows.shape[1])
    repeated = np.broadcast_to(rows.reshape(groups, 1, *shape[2:]), shape).reshape(-1, shape[3])
    scale = scales.reshape(len(scales), groups, -1).transpose(1, 0, 2).reshape(-1)
    signs = _Signs(repeated)

    def at(j: int, column: NDArray[Any], left: NDArray[Any] | None) -> tuple[Any, Any]:
        low, high = _safe_range(left) if pair_safe and left is not None else (-QMAX8, QMAX8)
        steps = signs.keep(_within(np.rint(column / scale), low, high), j)
        return steps, steps * scale

    found = _sweep(repeated, factor, at).reshape(shape)
    return found.transpose(1, 0, 2, 3).reshape(len(scales), *rows.shape)


def gptq_int4(
    rows: NDArray[np.float32],
    gram: NDArray[Any],
    block: int,
    *,
    pair_safe: bool = False,
    floor: Any = 0.0,
) -> IntegerWeight:
    """int4 in blocks, as `quantize_int4` stores them; each block's multiplier is chosen when its
    turn comes.
    """
    nearest = quantize_int4(rows, block, pair_safe=pair_safe, floor=floor)
    assert nearest.multipliers is not None
    diagonal = np.einsum("gpkk->gpk", gram).reshape(len(gram), -1)
    importance = diagonal.repeat(len(rows) // len(gram), axis=0)  # (C, K)
    factor, error = _factor(gram), output_noise(rows, nearest.values, gram)
    product, multipliers, scale = nearest.q.copy(), nearest.multipliers.copy(), nearest.scale.copy()
    for stretch in SAFE_STRETCHES if pair_safe else STRETCHES:
        wider = bfloat16(np.maximum(nearest.scale * stretch, floor).astype(np.float32))
        found, chosen = _int4_sweep(rows, factor, wider, importance, block, pair_safe=pair_safe)
        found_error = output_noise(rows, found * wider[:, None], gram)
        better = found_error < error
        product[better], multipliers[better] = found[better].astype(np.int8), chosen[better]
        scale[better], error[better] = wider[better], found_error[better]
    descended = _descend(rows, product, multipliers, scale, gram, pair_safe=pair_safe)
    better = output_noise(rows, descended * scale[:, None], gram) < error
    product[better] = descended[better]
    blocks = (product // np.repeat(multipliers, block, axis=1).astype(np.int8)).astype(np.int8)
    return IntegerWeight(product, scale, blocks, multipliers)


def _int4_sweep(
    rows: NDArray[np.float32],
    factor: NDArray[Any],
    scale: NDArray[np.float32],
    importance: NDArray[Any],
    block: int,
    *,
    pair_safe: bool,
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """The integers and multipliers of all columns on the grids of these scales.

    importance  (C, K), the diagonal of H, by which the errors of a block are weighted when its
                multiplier is chosen
    """
    multipliers = np.ones((len(rows), rows.shape[1] // block), np.uint8)
    signs = _Signs(rows)

    def start(j: int, ahead: NDArray[Any]) -> None:
        multipliers[:, j // block] = _best_multiplier(
            ahead / scale[:, None], importance[:, j : j + block]
        )

    def at(j: int, column: NDArray[Any], left: NDArray[Any] | None) -> tuple[Any, Any]:
        m = multipliers[:, j // block].astype(np.float32)
        steps = _within(np.rint(column / (scale * m)), QMIN4, QMAX4)
        if pair_safe and left is not None:
            low, high = _safe_range(left)
            steps = _within(steps, np.ceil(low / m), np.floor(high / m))
        steps = signs.keep(steps, j)
        return steps * m, steps * m * scale

    return _sweep(rows, factor, at, start, block), multipliers


def _descend(
    rows: NDArray[np.float32],
    product: NDArray[np.int8],
    multipliers: NDArray[np.uint8],
    scale: NDArray[np.float32],
    gram: NDArray[Any],
    *,
    pair_safe: bool,
) -> NDArray[np.int8]:
    """The integers after coordinate descent: each in turn is set to where the error is least, all
    others fixed.

    Source: Behdin et al. 2023, QuantEase (arXiv 2309.01885), algorithm 1.
    """
    groups, parts, k, _ = gram.shape
    signs = _Signs(rows)
    spread = np.repeat(multipliers, product.shape[1] // multipliers.shape[1], axis=1).astype(
        np.float32
    )
    out = product.astype(np.float32)
    gram32 = gram.astype(np.float32)
    diagonal = np.einsum("gpkk->gpk", gram32)  # a view
    # damped as in _factor: directions in which no input was seen must not drift
    diagonal += DAMPING * diagonal.mean(2, keepdims=True)
    each = rows.reshape(groups, -1, rows.shape[1])
    q, m = (x.reshape(each.shape) for x in (out, spread))
    s = scale.reshape(groups, -1)
    for g, p in np.ndindex(groups, parts):
        matrix = gram32[g, p]
        part = slice(p * k, p * k + k)
        of_group = slice(g * each.shape[1], (g + 1) * each.shape[1])
        slope = np.ascontiguousarray(
            ((each[g, :, part] - q[g, :, part] * s[g, :, None]) @ matrix).T
        )  # (k, rows)
        steps, sizes = (np.ascontiguousarray(x[g, :, part].T) for x in (q, m))
        for first in [*range(0, k, STRIPE)] * DESCENTS:
            stripe = slice(first, min(first + STRIPE, k))
            before = steps[stripe].copy()
            stripe_slope = slope[stripe]  # a view
            for j in range(k)[stripe]:
                if matrix[j, j] <= 0:
                    continue
                optimum = steps[j] + stripe_slope[j - first] / (matrix[j, j] * s[g])
                found = _within(np.rint(optimum / sizes[j]), QMIN4, QMAX4)
                if pair_safe and (neighbour := j ^ 1) < k:
                    low, high = _safe_range(steps[neighbour])
                    found = _within(found, np.ceil(low / sizes[j]), np.floor(high / sizes[j]))
                found = signs.keep(found, p * k + j, of_group)
                found *= sizes[j]
                stripe_slope -= matrix[stripe, j, None] * ((found - steps[j]) * s[g])
                steps[j] = found
            change = (steps[stripe] - before) * s[g]
            slope[:first] -= matrix[:first, stripe] @ change
            slope[stripe.stop :] -= matrix[stripe.stop :, stripe] @ change
        q[g, :, part] = steps.T
    return out.astype(np.int8)


class _Signs:
    """Bounds that keep the signs and the exact zeros of non-negative rows, as filter banks have.

    What follows such a row, a Log or Sqrt, has no value for a negative sum.
    """

    def __init__(self, rows: NDArray[np.float32]) -> None:
        self.rows = rows
        self.is_positive = rows.min(1, initial=0.0) >= 0
        self.any_positive = bool(self.is_positive.any())
        self.least = np.where(self.is_positive, 0.0, -np.inf).astype(np.float32)

    def keep(self, steps: NDArray[Any], column: int, chosen: Any = ...) -> NDArray[Any]:
        """The integers of this column (C,) within the bounds; `chosen` picks some of the rows."""
        if not self.any_positive:
            return steps
        is_zero = self.is_positive & (self.rows[:, column] == 0)
        most = np.where(is_zero, np.float32(0), np.float32(np.inf))
        return _within(steps, self.least[chosen], most[chosen])


def _safe_range(neighbour: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """The least and the largest integers that are safe beside these neighbours."""
    low = np.maximum(-PAIR_LIMIT - np.minimum(neighbour, 0), -QMAX8)
    high = np.minimum(PAIR_LIMIT - np.maximum(neighbour, 0), QMAX8)
    return low, high


def _sweep(
    rows: NDArray[np.float32],
    factor: NDArray[Any],
    at: Callable[..., tuple[Any, Any]],
    start: Callable[[int, NDArray[Any]], None] | None = None,
    block: int = 1,
) -> NDArray[np.float32]:
    """The integers (C, K) of all columns, from left to right.

    at     (j, column, left) -> the column's integers and their values; `left` is the even neighbour
           of an odd column
    start  (j, targets) is called before the first column j of a block, with what its columns would
           become unrounded
    """
    _, parts, columns, _ = factor.shape
    out = [
        _sweep_part(
            rows[:, p * columns : (p + 1) * columns], factor[:, p], p * columns, at, start, block
        )
        for p in range(parts)
    ]
    return np.concatenate(out, axis=1)


def _sweep_part(
    rows: NDArray[np.float32], factor: NDArray[Any], offset: int, at: Any, start: Any, block: int
) -> NDArray[np.float32]:
    """The integers of one part, whose first column is number `offset`; even, so that no pair is
    cut.
    """
    groups, columns = len(factor), rows.shape[1]
    stripe, step = (block * max(1, width // block) for width in (STRIPE, STEP))
    exact = rows.astype(np.float32).reshape(groups, -1, columns)
    targets = exact.copy()
    out = np.empty((columns, len(rows)), np.float32)
    for first in range(0, columns, stripe):
        last = min(first + stripe, columns)
        target, w = (
            np.ascontiguousarray(x[:, :, first:last].transpose(2, 0, 1)) for x in (targets, exact)
        )
        e = np.empty_like(target)  # a column of any of the three is contiguous
        for j in range(first, last):
            i = j - first
            if start is not None and j % block == 0:
                now = slice(i, i + block)
                inverse = np.linalg.inv(factor[:, j : j + block, j : j + block])
                shift = np.einsum("bgr,gbc->cgr", target[now] - w[now], inverse)
                start(offset + j, (w[now] + shift).reshape(-1, len(rows)).T)
            column = target[i]
            steps, values = at(offset + j, column.reshape(-1), out[j - 1] if j % 2 else None)
            out[j] = steps
            e[i] = w[i] - values.reshape(column.shape)
            end = min(i - i % step + step, last - first)
            target[i + 1 : end] += factor[:, j, j + 1 : first + end].T[:, :, None] * e[i]
            if i + 1 == end < last - first:
                done = slice(i - i % step, end)
                passed_on = factor[:, first:last, first:last][:, done, end:].transpose(0, 2, 1)
                target[end:] += (passed_on @ e[done].transpose(1, 0, 2)).transpose(1, 0, 2)
        if last < columns:
            targets[:, :, last:] += e.transpose(1, 2, 0) @ factor[:, first:last, last:]
    return np.ascontiguousarray(out.T)


def _factor(gram: NDArray[Any], times: float = 1.0) -> NDArray[np.float32]:
    """R_ij / R_jj of the upper R with R R' = H for each damped Gram matrix H, (G, P, k, k)."""
    damped = _damped(gram, times).reshape(-1, *gram.shape[2:])
    diagonal = np.arange(damped.shape[1])
    try:  # a lower factor of the columns in reverse order is an upper one
        upper: NDArray[Any] = np.linalg.cholesky(damped[:, ::-1, ::-1])[:, ::-1, ::-1]
    except np.linalg.LinAlgError:  # fewer samples than columns, all nearly equal
        return _factor(gram, 10 * times)
    ratios = upper / upper[:, None, diagonal, diagonal]
    return np.asarray(ratios.reshape(gram.shape), np.float32)


def _damped(gram: NDArray[Any], times: float = 1.0) -> NDArray[np.float32]:
    """H with so many times DAMPING of its mean diagonal added to that, (G, P, k, k)."""
    damped = gram.astype(np.float32)
    mean = np.einsum("gpkk->gpk", damped).mean(2, keepdims=True)
    diagonal = np.arange(damped.shape[2])
    damped[:, :, diagonal, diagonal] += np.where(mean > 0, times * DAMPING * mean, 1.0)
    return damped


def _within(steps: NDArray[Any], low: Any, high: Any) -> NDArray[Any]:
    """As numpy.clip, which takes several times as long on a column."""
    return np.asarray(np.minimum(np.maximum(steps, low), high))


def _best_multiplier(grouped: NDArray[Any], weight: NDArray[Any]) -> NDArray[np.uint8]:
    """Per row, the multiplier with the least weighted squared error of one block (C, block)."""
    least, best = np.full(len(grouped), np.inf), np.ones(len(grouped), np.uint8)
    for m in range(1, MULTIPLIER_MAX + 1):
        d = grouped - np.clip(np.rint(grouped / m), QMIN4, QMAX4) * m
        error = np.einsum("ck,ck,ck->c", d, d, weight)
        better = error < least
        least, best = np.where(better, error, least), np.where(better, np.uint8(m), best)
    return best


def _row_scale(weight: IntegerWeight, rows: int) -> NDArray[np.float32]:
    return np.ascontiguousarray(np.broadcast_to(weight.scale, (rows,)))

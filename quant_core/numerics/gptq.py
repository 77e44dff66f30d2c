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
from dataclasses import dataclass
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
SWEPT_VALUES = 4 << 20  # of all grids that are swept at once, if one alone has fewer: for memory
MAX_COLUMNS = 1536  # of one Gram matrix: factoring it takes the cube of that
# As arrays: numpy takes longer to convert a number of Python than to compare a column with it.
_LEAST8, _MOST8, _PAIR = (np.array(x, np.float32) for x in (-QMAX8, QMAX8, PAIR_LIMIT))


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
    factor = _Factor.of(gram)
    judged = _damping(gram, JUDGED_DAMPING)
    error = output_noise(rows, nearest.values, _damped(gram, judged))
    q, scale = nearest.q.copy(), widest.copy()
    together = max(1, SWEPT_VALUES // max(1, rows.size))
    for first in range(0, len(scales), together):
        some = np.stack(scales[first : first + together])
        for candidate, swept in zip(
            some, _int8_sweep(rows, factor, some, pair_safe=pair_safe), strict=True
        ):
            found, found_error = swept.integers, swept.noise(judged)
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
    return _damped(gram, _damping(gram, JUDGED_DAMPING))


def _int8_sweep(
    rows: NDArray[np.float32],
    factor: _Factor,
    scales: NDArray[np.float32],
    *,
    pair_safe: bool,
) -> list[_Swept]:
    """All columns swept on the grid of each of S scales (S, C) of each row."""
    repeated, scale = _repeated(rows, scales, factor.groups)
    signs = _Signs(repeated)

    def at(j: int, column: NDArray[Any], left: NDArray[Any] | None) -> tuple[Any, Any]:
        low, high = _safe_range(left) if pair_safe and left is not None else (_LEAST8, _MOST8)
        steps = signs.keep(_within(np.rint(column / scale), low, high), j)
        return steps, steps * scale

    return _sweep(repeated, factor, at).split(len(scales))


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
    factor, exact = _Factor.of(gram), np.zeros(gram.shape[:2])
    error = output_noise(rows, nearest.values, gram)
    product, multipliers, scale = nearest.q.copy(), nearest.multipliers.copy(), nearest.scale.copy()
    scales = [
        bfloat16(np.maximum(nearest.scale * stretch, floor).astype(np.float32))
        for stretch in (SAFE_STRETCHES if pair_safe else STRETCHES)
    ]
    together = max(1, SWEPT_VALUES // max(1, rows.size))
    for first in range(0, len(scales), together):
        some = np.stack(scales[first : first + together])
        for wider, (swept, chosen) in zip(
            some, _int4_sweep(rows, factor, some, gram, block, pair_safe=pair_safe), strict=True
        ):
            found_error = swept.noise(exact)
            better = found_error < error
            product[better], multipliers[better] = swept.integers[better], chosen[better]
            scale[better], error[better] = wider[better], found_error[better]
    descended, found_error = _descend(rows, product, multipliers, scale, gram, pair_safe=pair_safe)
    better = found_error < error
    product[better] = descended[better]
    blocks = (product // np.repeat(multipliers, block, axis=1).astype(np.int8)).astype(np.int8)
    return IntegerWeight(product, scale, blocks, multipliers)


def _int4_sweep(
    rows: NDArray[np.float32],
    factor: _Factor,
    scales: NDArray[np.float32],
    gram: NDArray[Any],
    block: int,
    *,
    pair_safe: bool,
) -> list[tuple[_Swept, NDArray[np.uint8]]]:
    """All columns swept on the grid of each of S scales (S, C), and the multipliers of the blocks.

    The errors of a block are weighted by the diagonal of H when its multiplier is chosen.
    """
    repeated, scale = _repeated(rows, scales, factor.groups)
    importance = np.einsum("gpkk->gpk", gram).reshape(len(gram), -1).astype(np.float32)  # (G, K)
    multipliers = np.ones((len(repeated), rows.shape[1] // block), np.uint8)
    signs = _Signs(repeated)

    def start(j: int, ahead: NDArray[Any]) -> None:
        multipliers[:, j // block] = _best_multipliers(
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

    swept = _sweep(repeated, factor, at, start, block).split(len(scales))
    chosen = _by_scale(multipliers, len(scales), factor.groups)
    return list(zip(swept, chosen, strict=True))


def _descend(
    rows: NDArray[np.float32],
    product: NDArray[np.int8],
    multipliers: NDArray[np.uint8],
    scale: NDArray[np.float32],
    gram: NDArray[Any],
    *,
    pair_safe: bool,
) -> tuple[NDArray[np.int8], NDArray[np.float64]]:
    """The integers after coordinate descent, and the output noise (C,) of each row: each integer in
    turn is set to where the error is least, all others fixed.

    Source: Behdin et al. 2023, QuantEase (arXiv 2309.01885), algorithm 1.
    """
    groups, parts, k, _ = gram.shape
    signs = _Signs(rows)
    spread = np.repeat(multipliers, product.shape[1] // multipliers.shape[1], axis=1).astype(
        np.float32
    )
    out = product.astype(np.float32)
    # as in _Factor: directions in which no input was seen must not drift
    damping = _damping(gram)
    damped = _damped(gram, damping)
    each = rows.reshape(groups, -1, rows.shape[1])
    q, m = (x.reshape(each.shape) for x in (out, spread))
    s = scale.reshape(groups, -1)
    noise = np.zeros(s.shape)
    for g, p in np.ndindex(groups, parts):
        matrix = damped[g, p]
        part = slice(p * k, p * k + k)
        of_group = slice(g * each.shape[1], (g + 1) * each.shape[1])
        steps, sizes, exact = (np.ascontiguousarray(x[g, :, part].T) for x in (q, m, each))
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
                    found = _within(np.rint(optimum / sizes[j]), QMIN4, QMAX4)
                    if pair_safe and (neighbour := j ^ 1) < k:
                        low, high = _safe_range(steps[neighbour])
                        found = _within(found, np.ceil(low / sizes[j]), np.floor(high / sizes[j]))
                    found = signs.keep(found, p * k + j, of_group)
                    found *= sizes[j]
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
    """The least and the largest integers that are safe beside these neighbours.

    A neighbour of the other sign leaves more than an integer can use.
    """
    return np.maximum(-_PAIR - neighbour, _LEAST8), np.minimum(_PAIR - neighbour, _MOST8)


@dataclass(frozen=True, slots=True, eq=False)
class _Factor:
    """The factor R of damped Gram matrices H + damping I = R R', each with R upper triangular.

    ratios   R_ij / R_jj, (G, P, k, k)
    squares  R_jj^2, (G, P, k)
    damping  (G, P)
    """

    ratios: NDArray[np.float32]
    squares: NDArray[np.float32]
    damping: NDArray[np.float64]

    @classmethod
    def of(cls, gram: NDArray[Any], times: float = 1.0) -> _Factor:
        damping = _damping(gram, times)
        damped = _damped(gram, damping).reshape(-1, *gram.shape[2:])
        diagonal = np.arange(damped.shape[1])
        try:  # a lower factor of the columns in reverse order is an upper one
            upper: NDArray[Any] = np.linalg.cholesky(damped[:, ::-1, ::-1])[:, ::-1, ::-1]
        except np.linalg.LinAlgError:  # fewer samples than columns, all nearly equal
            return cls.of(gram, 10 * times)
        own = upper[:, None, diagonal, diagonal]
        ratios = np.asarray((upper / own).reshape(gram.shape), np.float32)
        return cls(ratios, np.square(own).reshape(gram.shape[:3]), damping)

    @property
    def groups(self) -> int:
        return len(self.ratios)


@dataclass(frozen=True, slots=True, eq=False)
class _Swept:
    """What a sweep made of rows: their integers (C, K), and what their errors d = w - q make.

    damped_noise  d' (H + damping I) d summed over parts, (C,): what was left of the target of each
                  column, squared, times R_jj^2
    squares       d' d in each part, (C, P)
    damping       of each row and part, (C, P)
    groups        G
    """

    integers: NDArray[np.float32]
    damped_noise: NDArray[np.float64]
    squares: NDArray[np.float64]
    damping: NDArray[np.float64]
    groups: int

    def noise(self, damping: NDArray[np.float64]) -> NDArray[np.float64]:
        """(C,): what `output_noise` is by H with this damping (G, P)."""
        wanted = damping.repeat(len(self.damping) // len(damping), axis=0)
        return np.asarray(self.damped_noise + ((wanted - self.damping) * self.squares).sum(1))

    def split(self, count: int) -> list[_Swept]:
        """The same of each of so many scales, where `_repeated` put them together."""
        integers, noise, squares, damping = (
            _by_scale(x, count, self.groups)
            for x in (self.integers, self.damped_noise, self.squares, self.damping)
        )
        return [
            _Swept(integers[i], noise[i], squares[i], damping[i], self.groups) for i in range(count)
        ]


def _repeated(
    rows: NDArray[np.float32], scales: NDArray[np.float32], groups: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Rows (S C, K) and their scales (S C,), group by group, in which every row occurs once for
    each of its S scales (S, C).

    All are swept at once: on small weights, calls of numpy take longer than arithmetic.
    """
    shape = (groups, len(scales), len(rows) // groups, rows.shape[1])
    repeated = np.broadcast_to(rows.reshape(groups, 1, *shape[2:]), shape).reshape(-1, shape[3])
    return repeated, scales.reshape(len(scales), groups, -1).transpose(1, 0, 2).reshape(-1)


def _by_scale(x: NDArray[Any], count: int, groups: int) -> NDArray[Any]:
    """(S, C, ...) of what is known of `_repeated` rows, (S C, ...)."""
    apart = x.reshape(groups, count, -1, *x.shape[1:])
    return apart.swapaxes(0, 1).reshape(count, -1, *x.shape[1:])


def _sweep(
    rows: NDArray[np.float32],
    factor: _Factor,
    at: Callable[..., tuple[Any, Any]],
    start: Callable[[int, NDArray[Any]], None] | None = None,
    block: int = 1,
) -> _Swept:
    """The integers of all columns, from left to right, and their noise.

    at     (j, column, left) -> the column's integers and their values; `left` is the even neighbour
           of an odd column
    start  (j, targets) is called before the first column j of a block, with what its columns would
           become unrounded
    """
    parts = factor.ratios.shape[1]
    found = [_sweep_part(rows, factor, p, at, start, block) for p in range(parts)]
    integers, noises, squares = zip(*found, strict=True)
    return _Swept(
        np.concatenate(integers, axis=1),
        np.sum(noises, axis=0),
        np.stack(squares, axis=1),
        factor.damping.repeat(len(rows) // factor.groups, axis=0),
        factor.groups,
    )


def _sweep_part(
    rows: NDArray[np.float32], factors: _Factor, p: int, at: Any, start: Any, block: int
) -> tuple[NDArray[np.float32], NDArray[np.float64], NDArray[np.float64]]:
    """Of part p: the integers, their noise by the damped H, and their squared errors.

    Its width is even, so that no pair is cut.
    """
    factor = factors.ratios[:, p]
    groups, columns, _ = factor.shape
    offset = p * columns
    stripe, step = (block * max(1, width // block) for width in (STRIPE, STEP))
    exact = rows[:, offset : offset + columns].astype(np.float32).reshape(groups, -1, columns)
    targets = exact.copy()
    out = np.empty((columns, len(rows)), np.float32)
    noise, squares = np.zeros(len(rows)), np.zeros(len(rows))
    for first in range(0, columns, stripe):
        last = min(first + stripe, columns)
        target, w = (
            np.ascontiguousarray(x[:, :, first:last].transpose(2, 0, 1)) for x in (targets, exact)
        )
        e = np.empty_like(target)  # a column of any of the three is contiguous
        within = factor[:, first:last, first:last]
        ahead = np.ascontiguousarray(within.transpose(1, 2, 0))[:, :, :, None]
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
            rounded = values.reshape(column.shape)
            np.subtract(w[i], rounded, out=e[i])
            end = min(i - i % step + step, last - first)
            target[i + 1 : end] += ahead[i, i + 1 : end] * e[i]
            column -= rounded  # what is left of its target
            if i + 1 == end < last - first:
                done = slice(i - i % step, end)
                passed_on = within[:, done, end:].transpose(0, 2, 1)
                target[end:] += (passed_on @ e[done].transpose(1, 0, 2)).transpose(1, 0, 2)
        if last < columns:
            targets[:, :, last:] += e.transpose(1, 2, 0) @ factor[:, first:last, last:]
        of_columns = factors.squares[:, p, first:last].T[:, :, None]
        noise += (np.square(target) * of_columns).sum(0, dtype=np.float64).reshape(-1)
        squares += np.square(e).sum(0, dtype=np.float64).reshape(-1)
    return np.ascontiguousarray(out.T), noise, squares


def _damping(gram: NDArray[Any], times: float = 1.0) -> NDArray[np.float64]:
    """(G, P): so many times DAMPING of the mean diagonal of each matrix; 1 where that is 0."""
    mean = np.einsum("gpkk->gpk", gram).mean(2, dtype=np.float64)
    return np.where(mean > 0, times * DAMPING * mean, 1.0)


def _damped(gram: NDArray[Any], damping: NDArray[np.float64]) -> NDArray[np.float32]:
    """H with the damping (G, P) of each matrix added to its diagonal, (G, P, k, k)."""
    damped = gram.astype(np.float32)
    diagonal = np.arange(damped.shape[2])
    damped[:, :, diagonal, diagonal] += damping[:, :, None].astype(np.float32)
    return damped


def _within(steps: NDArray[Any], low: Any, high: Any) -> NDArray[Any]:
    """As numpy.clip, which takes several times as long on a column."""
    return np.asarray(np.minimum(np.maximum(steps, low), high))


def _best_multipliers(grouped: NDArray[Any], weight: NDArray[Any]) -> NDArray[np.uint8]:
    """Per row, the multiplier with the least weighted squared error of one block.

    grouped  (C, block), in steps
    weight   (G, block), of each group of C / G rows
    """
    m = np.arange(1, MULTIPLIER_MAX + 1, dtype=np.float32)[:, None, None]
    difference = grouped / m
    np.rint(difference, out=difference)
    np.minimum(difference, np.float32(QMAX4), out=difference)
    np.maximum(difference, np.float32(QMIN4), out=difference)
    difference *= m
    difference -= grouped
    np.square(difference, out=difference)
    of_groups = difference.reshape(len(m), len(weight), -1, grouped.shape[1])
    errors = (of_groups @ weight[:, :, None]).reshape(len(m), -1)
    return np.asarray(errors.argmin(0) + 1, np.uint8)


def _row_scale(weight: IntegerWeight, rows: int) -> NDArray[np.float32]:
    return np.ascontiguousarray(np.broadcast_to(weight.scale, (rows,)))

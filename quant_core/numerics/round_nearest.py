"""Rounding to nearest: in 8 bits per channel or per tensor, in 4 bits per block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quant_core.numerics.granularity import Granularity, PerChannel, PerTensor
from quant_core.numerics.integer_weight import QMAX8, IntegerWeight, bfloat16
from quant_core.numerics.levels import EVEN, MULTIPLIER_MAX, NORMAL, Levels
from quant_core.numerics.saturation import make_safe, safe_scale

Matrix = NDArray[np.float32]
# Integers, their scales and what else is kept of each row: of some rows, for one candidate.
Attempt = Callable[[slice, int], tuple[NDArray[Any], ...]]

BLOCK_MIN = 8  # of columns: a multiplier takes as many bits as a weight
FEW_WEIGHTS = 1 << 16  # that choose the levels of all: not tuned, saves time
CHUNK = 1 << 20  # weights that are rounded at a time, so that temporaries stay small
# Of the scale max|w| / 127: a smaller one clips the largest weights and rounds all others more
# finely. Not tuned; the tests of this file show that the search never loses to 1.0.
SHRINKS = (1.0, 0.97, 0.93, 0.88, 0.82)
# Between the finest scale (0), whose unsafe pairs must be reduced, and the one at which all pairs
# are safe (1).
SAFE_STEPS = (1.0, 0.75, 0.5, 0.25, 0.0)
# Of the finest scale of 4 bits: with wider steps more pairs are safe unreduced. Not tuned; a test
# of this file shows what safety costs.
SAFE_STRETCHES = (1.0, 1.15, 1.35)


def quantize_int8(
    rows: Matrix,
    granularity: Granularity = PerChannel(),  # noqa: B008  (frozen)
    *,
    pair_safe: bool = False,
    floor: NDArray[Any] | float = 0.0,
    search_scale: bool = True,
) -> IntegerWeight:
    """int8 rows (C, K) in -127..127, with scales (C,) or, PerTensor, ().

    pair_safe     no pair of neighbours can saturate int16 (saturation.py); then the least error is
                  sought between the finest scale, whose unsafe pairs are reduced, and the scale at
                  which all pairs are safe by themselves
    floor         scales are at least this: a number, or one per row (a bias must fit into int32)
    search_scale  take the scale with the least squared error among a few near max|w| / 127, instead
                  of just that
    """
    is_per_channel = granularity != PerTensor()
    finest = np.abs(rows).max(1, initial=0.0).astype(np.float64) / QMAX8
    widest = np.maximum(finest, safe_scale(rows)) if pair_safe else finest
    if not is_per_channel:
        finest = np.full_like(finest, finest.max())
        widest = np.full_like(widest, widest.max())
    if not search_scale:
        candidates = [widest]
    elif pair_safe:
        ratio = widest / np.maximum(finest, 1e-300)
        candidates = [finest * ratio**t for t in SAFE_STEPS]
    else:
        candidates = [finest * t for t in SHRINKS]
    floors = np.broadcast_to(np.asarray(floor, np.float64), finest.shape)
    if not is_per_channel:
        floors = np.full_like(finest, floors.max(initial=0.0))

    def attempt(part: slice, candidate: int) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
        scale = _usable(np.maximum(candidates[candidate][part], floors[part]))
        steps = rows[part] / scale[:, None]
        np.clip(np.rint(steps, out=steps), -QMAX8, QMAX8, out=steps)
        q = steps.astype(np.int8)
        return (make_safe(q) if pair_safe else q), scale

    q, scale = _least_error(rows, attempt, len(candidates), per_row=is_per_channel)
    return IntegerWeight(q, scale if is_per_channel else scale[0])


def _least_error(
    rows: Matrix,
    attempt: Attempt,
    n: int,
    *,
    per_row: bool,
) -> tuple[NDArray[Any], ...]:
    """What the best of n attempts gives, by squared error, row by row or for all rows at once."""
    parts = list(_row_parts(rows))
    candidates = list(range(n))
    if n > 1 and not per_row:
        totals = [
            sum(_squared_errors(rows[part], *attempt(part, k)).sum() for part in parts)
            for k in candidates
        ]
        candidates = [int(np.argmin(totals))]
    kept: tuple[NDArray[Any], ...] = ()
    for part in parts:
        first = attempt(part, candidates[0])
        kept = kept or tuple(np.empty((len(rows), *x.shape[1:]), x.dtype) for x in first)
        for whole, some in zip(kept, first, strict=True):
            whole[part] = some
        if len(candidates) == 1:
            continue
        least = _squared_errors(rows[part], *first[:2])
        for k in candidates[1:]:
            found = attempt(part, k)
            errors = _squared_errors(rows[part], *found[:2])
            better = errors < least
            for whole, some in zip(kept, found, strict=True):
                whole[part][better] = some[better]
            least = np.minimum(errors, least)
    return kept


def _squared_errors(
    rows: Matrix, q: NDArray[np.int8], scale: NDArray[np.float32]
) -> NDArray[np.float64]:
    """(C,). In steps first: squares of tiny weights would underflow in float32."""
    steps = rows / scale[:, None]
    steps -= q
    found = np.einsum("ck,ck->c", steps, steps).astype(np.float64)
    return np.asarray(found * np.square(scale, dtype=np.float64))


def block_width(columns: int, wanted: int) -> int:
    """The divisor of `columns` nearest to the wanted block (by ratio), so that no block is cut.

    Not below BLOCK_MIN: a prime number of columns is one block.
    """
    least = min(columns, BLOCK_MIN)
    divisors = [d for d in range(least, columns + 1) if columns % d == 0]
    return min(divisors, key=lambda d: (abs(np.log2(d / wanted)), -d))


def quantize_int4(
    rows: Matrix,
    block: int,
    *,
    pair_safe: bool = False,
    floor: NDArray[Any] | float = 0.0,
    levels: Levels = EVEN,
) -> IntegerWeight:
    """int4 in blocks of `block` columns (which divide K): w ~ scale[c] * levels of the block's
    multiplier.

    With the finest scale of a channel the block with its largest weight has multiplier 15; where
    pairs must be safe, a wider one may leave less error. Each block takes the multiplier with the
    least squared error. All levels are int8 on the channel's own grid. Scales are bfloat16 numbers,
    which take half the bytes.
    """
    finest = np.abs(rows).max(1, initial=0.0).astype(np.float64) / levels.reach
    stretches = SAFE_STRETCHES if pair_safe else (1.0,)
    scales = [bfloat16(_usable(np.maximum(finest * stretch, floor))) for stretch in stretches]

    def attempt(part: slice, candidate: int) -> tuple[NDArray[Any], ...]:
        scale = scales[candidate][part]
        q, multipliers = _in_blocks(rows[part] / scale[:, None], block, levels)
        spread = multipliers.repeat(block, axis=1)
        blocks = levels.integers(q, spread)
        if pair_safe:
            q, blocks = _safe_blocks(blocks, spread, levels)
        return q, scale, blocks, multipliers

    q, scale, blocks, multipliers = _least_error(rows, attempt, len(scales), per_row=True)
    return IntegerWeight(q, scale, blocks, multipliers, levels)


def fitting_levels(rows: Matrix, block: int) -> Levels:
    """The levels that leave less squared error in some of the rows, rounded to nearest: even ones
    where weights are spread evenly, as many are before training.
    """
    some = rows[:: max(1, rows.size // FEW_WEIGHTS)]

    def error(levels: Levels) -> float:
        found = quantize_int4(some, block, levels=levels)
        return float(_squared_errors(some, found.q, found.scale).sum())

    return min((EVEN, NORMAL), key=error)


def _in_blocks(
    steps: Matrix, block: int, levels: Levels
) -> tuple[NDArray[np.int8], NDArray[np.uint8]]:
    """The levels nearest to these numbers of steps (C, K), and the multipliers."""
    grouped = steps.reshape(len(steps), -1, block)
    least = np.full(grouped.shape[:2], np.inf, np.float32)
    best = np.ones(grouped.shape[:2], np.uint8)
    for m in range(1, MULTIPLIER_MAX + 1):
        difference = grouped - levels.nearest(grouped, np.array(m))
        error = np.einsum("cbk,cbk->cb", difference, difference)
        better = error < least
        least, best = np.where(better, error, least), np.where(better, np.uint8(m), best)
    return levels.nearest(grouped, best[..., None]).reshape(steps.shape).astype(np.int8), best


def _safe_blocks(
    blocks: NDArray[np.int8], multipliers: NDArray[np.uint8], levels: Levels
) -> tuple[NDArray[np.int8], NDArray[np.int8]]:
    """The larger of two neighbours gives up one step, until every pair of levels is safe: the
    levels, and their int4 blocks.
    """
    while True:
        q = levels.of(blocks, multipliers)
        magnitude = np.abs(q.astype(np.int16))
        reduced = np.abs(make_safe(q).astype(np.int16)) < magnitude
        if not reduced.any():
            return q, blocks
        larger = np.zeros_like(reduced)
        larger[:, : reduced.shape[1] // 2 * 2] = _larger_of_pair(magnitude, reduced)
        blocks = (blocks - np.where(larger, np.sign(blocks), 0)).astype(np.int8)


def _larger_of_pair(magnitude: NDArray[np.int16], reduced: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The larger weight of each pair that has a reduced one: (C, K without an odd last)."""
    even = magnitude.shape[1] // 2 * 2
    needed = reduced[:, :even:2] | reduced[:, 1:even:2]
    first = magnitude[:, :even:2] >= magnitude[:, 1:even:2]
    return np.stack([needed & first, needed & ~first], axis=2).reshape(len(magnitude), even)


def _row_parts(rows: Matrix) -> Iterator[slice]:
    """Slices of rows with about CHUNK weights each, at least one."""
    step = max(1, CHUNK // max(rows.shape[1], 1))
    return (slice(i, min(i + step, len(rows))) for i in range(0, max(len(rows), 1), step))


def _usable(scale: NDArray[np.float64]) -> NDArray[np.float32]:
    """float32, 1 for a row of zeros, never subnormal."""
    tiny = float(np.finfo(np.float32).tiny)
    return np.where(scale > 0, np.maximum(scale, tiny), 1.0).astype(np.float32)

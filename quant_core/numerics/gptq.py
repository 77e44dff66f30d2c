"""GPTQ: rounding in which each column makes up for the errors of the columns before it.

Source: Frantar et al. 2022, GPTQ (arXiv 2210.17323), algorithm 1, without reordering: neighbours
must stay neighbours, so that the pair rule of saturation.py can be kept on the way (the later of
two takes what the earlier one left).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from quant_core.numerics.column_bounds import LEAST8, MOST8, Signs, safe_range, within
from quant_core.numerics.descent import descend
from quant_core.numerics.granularity import Granularity, PerChannel, PerTensor
from quant_core.numerics.integer_weight import QMAX8, IntegerWeight, bfloat16
from quant_core.numerics.levels import EVEN, MULTIPLIER_MAX, Levels
from quant_core.numerics.output_noise import JUDGED_DAMPING, damped, damping_of, output_noise
from quant_core.numerics.round_nearest import quantize_int4, quantize_int8
from quant_core.numerics.sweep import Factor, Swept, by_scale, repeated_for, sweep

# Of the finest scale of four bits: smaller ones clip the largest block, larger ones let more pairs
# be safe unreduced. Judge a change with `python -m tests.bench.int4`.
STRETCHES = (1.0, 0.8, 0.9, 1.07, 1.15)
SAFE_STRETCHES = (1.0, 0.9, 1.15, 1.35, 1.6)
SWEPT_VALUES = 4 << 20  # of all grids that are swept at once, if one alone has fewer: for memory


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
    factor = Factor.of(gram)
    judged = damping_of(gram, JUDGED_DAMPING)
    error = output_noise(rows, nearest.values, damped(gram, judged))
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


def _int8_sweep(
    rows: NDArray[np.float32],
    factor: Factor,
    scales: NDArray[np.float32],
    *,
    pair_safe: bool,
) -> list[Swept]:
    """All columns swept on the grid of each of S scales (S, C) of each row."""
    repeated, scale = repeated_for(rows, scales, factor.groups)
    signs = Signs(repeated)

    def at(j: int, column: NDArray[Any], left: NDArray[Any] | None) -> tuple[Any, Any]:
        low, high = safe_range(left) if pair_safe and left is not None else (LEAST8, MOST8)
        steps = signs.keep(within(np.rint(column / scale), low, high), j)
        return steps, steps * scale

    return sweep(repeated, factor, at).split(len(scales))


def gptq_int4(
    rows: NDArray[np.float32],
    gram: NDArray[Any],
    block: int,
    *,
    pair_safe: bool = False,
    floor: Any = 0.0,
    levels: Levels = EVEN,
) -> IntegerWeight:
    """int4 in blocks, as `quantize_int4` stores them; each block's multiplier is chosen when its
    turn comes.
    """
    nearest = quantize_int4(rows, block, pair_safe=pair_safe, floor=floor, levels=levels)
    assert nearest.multipliers is not None
    factor, exact = Factor.of(gram), np.zeros(gram.shape[:2])
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
            some,
            _int4_sweep(rows, factor, some, gram, block, levels, pair_safe=pair_safe),
            strict=True,
        ):
            found_error = swept.noise(exact)
            better = found_error < error
            product[better], multipliers[better] = swept.integers[better], chosen[better]
            scale[better], error[better] = wider[better], found_error[better]
    spread = multipliers.repeat(block, axis=1)
    descended, found_error = descend(
        rows, product, spread, scale, gram, levels, pair_safe=pair_safe
    )
    better = found_error < error
    product[better] = descended[better]
    return IntegerWeight(product, scale, levels.integers(product, spread), multipliers, levels)


def _int4_sweep(
    rows: NDArray[np.float32],
    factor: Factor,
    scales: NDArray[np.float32],
    gram: NDArray[Any],
    block: int,
    levels: Levels,
    *,
    pair_safe: bool,
) -> list[tuple[Swept, NDArray[np.uint8]]]:
    """All columns swept on the grid of each of S scales (S, C), and the multipliers of the blocks.

    The errors of a block are weighted by the diagonal of H when its multiplier is chosen.
    """
    repeated, scale = repeated_for(rows, scales, factor.groups)
    importance = np.einsum("gpkk->gpk", gram).reshape(len(gram), -1).astype(np.float32)  # (G, K)
    multipliers = np.ones((len(repeated), rows.shape[1] // block), np.uint8)
    signs = Signs(repeated)

    def start(j: int, ahead: NDArray[Any]) -> None:
        multipliers[:, j // block] = _best_multipliers(
            ahead / scale[:, None], importance[:, j : j + block], levels
        )

    def at(j: int, column: NDArray[Any], left: NDArray[Any] | None) -> tuple[Any, Any]:
        m = multipliers[:, j // block]
        steps = levels.nearest(column / scale, m)
        if pair_safe and left is not None:
            steps = levels.within(steps, *safe_range(left), m)
        steps = signs.keep(steps, j)
        return steps, steps * scale

    swept = sweep(repeated, factor, at, start, block).split(len(scales))
    chosen = by_scale(multipliers, len(scales), factor.groups)
    return list(zip(swept, chosen, strict=True))


def _best_multipliers(
    grouped: NDArray[Any], weight: NDArray[Any], levels: Levels
) -> NDArray[np.uint8]:
    """Per row, the multiplier with the least weighted squared error of one block.

    grouped  (C, block), in steps
    weight   (G, block), of each group of C / G rows
    """
    m = np.arange(1, MULTIPLIER_MAX + 1)[:, None, None]
    difference = levels.nearest(grouped, m)
    difference -= grouped
    np.square(difference, out=difference)
    of_groups = difference.reshape(len(m), len(weight), -1, grouped.shape[1])
    errors = (of_groups @ weight[:, :, None]).reshape(len(m), -1)
    return np.asarray(errors.argmin(0) + 1, np.uint8)


def _row_scale(weight: IntegerWeight, rows: int) -> NDArray[np.float32]:
    return np.ascontiguousarray(np.broadcast_to(weight.scale, (rows,)))

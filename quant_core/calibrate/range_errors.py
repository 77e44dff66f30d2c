"""What a range of a tensor's values costs: by rounding and clipping, and in information."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quant_core.calibrate.stats import TensorStats
from quant_core.numerics.affine import Grid, choose_params

Array = NDArray[np.float64]
Range = tuple[float, float]


@dataclass(frozen=True, slots=True, eq=False)
class Histogram:
    """The histogram of a statistic in float64.

    edges   (bins + 1,), of which the outermost are the exact minimum and maximum
    counts  (bins,)
    """

    edges: Array
    counts: Array

    @classmethod
    def of(cls, stats: TensorStats) -> Histogram:
        """The histogram of a statistic that has seen a value."""
        numbers = stats.first + np.arange(stats.counts.size + 1, dtype=np.float64)
        edges = numbers * stats.width
        edges[0], edges[-1] = stats.lo, stats.hi
        return cls(edges, stats.counts.astype(np.float64))

    def outline(self, bins: int) -> list[int]:
        """Per mille of the values in `bins` equal bins from the minimum to the maximum.

        Values count as spread evenly over their own bin.
        """
        places = np.linspace(self.edges[0], self.edges[-1], bins + 1)
        below = np.interp(places, self.edges, np.append(0, np.cumsum(self.counts)))
        return [round(1000 * share) for share in np.diff(below) / below[-1]]

    def halved(self) -> Histogram:
        """This histogram in half as many bins, rounded up."""
        starts = np.arange(0, self.counts.size, 2)
        edges = np.append(self.edges[starts], self.edges[-1])
        return Histogram(edges, np.add.reduceat(self.counts, starts))


def expected_errors(histogram: Histogram, los: Array, his: Array, grid: Grid) -> Array:
    """(R,) mean squared errors that R ranges [lo, hi] cost by rounding and clipping, as expected.

    Values count as spread evenly over their bin. All methods are compared by this error.
    """
    params = choose_params(los, his, grid, axis=0)
    scales, zeros = (x.astype(np.float64) for x in (params.scale, params.zero_point))
    widths = np.diff(histogram.edges)
    points = np.flatnonzero(widths == 0)  # bins that hold one value each
    density = np.divide(histogram.counts, widths, out=np.zeros_like(widths), where=widths > 0)
    # Of each bin, density times what the integral of (x - nearest level) ** 2 grows by from edge to
    # edge. Summed by edges, that is the integral at each of them times how the density falls there.
    falls = np.zeros_like(histogram.edges)
    falls[:-1] -= density
    falls[1:] += density
    errors = np.empty(len(scales))
    # One range after the other: what is computed of one stays in the cache.
    for k, (scale, zero) in enumerate(zip(scales, zeros, strict=True)):
        # The integral in steps: 1/12 for every whole step passed, and d ** 3 / 3 for the rest.
        # Beyond the last level d grows on, and the same term is the clipping error.
        steps = histogram.edges / scale
        levels = np.rint(steps)
        np.minimum(np.maximum(levels, grid.qmin - zero, out=levels), grid.qmax - zero, out=levels)
        d = np.subtract(steps, levels, out=steps)
        of_points = float(histogram.counts[points] @ d[points] ** 2) if points.size else 0.0
        cube = d * d
        cube *= d
        cube *= 4
        cube += levels
        errors[k] = max(0.0, scale * float(cube @ falls) / 12 + of_points) * scale**2
    return np.asarray(errors / histogram.counts.sum())


def kl_divergence(histogram: Histogram, lo: float, hi: float, step: float) -> float:
    """Kullback-Leibler divergence, in nats, of a clipped histogram P from its quantized form Q.

    P counts what lies beyond [lo, hi] in its outermost bins. Q has one mass for each level, `step`
    apart, spread evenly over the bins of the level that P fills. Infinite if Q misses a bin of P.
    """
    middles = (histogram.edges[1:] + histogram.edges[:-1]) / 2
    start, stop = np.searchsorted(middles, lo), np.searchsorted(middles, hi, "right")
    inside = histogram.counts[start:stop]
    if not inside.any():
        return np.inf
    clipped = inside.copy()
    clipped[0] += histogram.counts[:start].sum()
    clipped[-1] += histogram.counts[stop:].sum()
    filled = clipped > 0
    # what was clipped is missing in the masses of the levels
    levels = np.rint(middles[start:stop] / step)
    runs = np.flatnonzero(np.diff(levels, prepend=-np.inf))
    mass = np.add.reduceat(inside, runs)
    bins = np.add.reduceat(filled.astype(np.float64), runs)
    spread = np.repeat(mass / np.maximum(bins, 1), np.diff(runs, append=levels.size))[filled]
    if not spread.all():
        return np.inf
    p = clipped[filled] / clipped.sum()
    q = spread / spread.sum()
    return float(np.sum(p * np.log(p / q)))


def rough_errors(histogram: Histogram, los: Array, his: Array, grid: Grid) -> Array:
    """(R,) mean squared errors of R ranges: fast, and right up to a bin at each border.

    Cumulated moments m0, m1, m2 of the histogram give the clipping error beyond both ends.
    """
    left, right = histogram.edges[:-1], histogram.edges[1:]
    share = histogram.counts / histogram.counts.sum()
    powers = (
        np.ones_like(left),
        (left + right) / 2,
        (left * left + left * right + right * right) / 3,
    )
    m0, m1, m2 = (np.concatenate([[0], np.cumsum(share * power)]) for power in powers)
    step = step_of(los, his, grid)
    lowest = np.searchsorted(left, los)
    above = np.searchsorted(left, his)
    # the bins from `start` to `stop` round to zero
    start = np.maximum(np.searchsorted(left, -step / 2), lowest)
    stop = np.minimum(np.searchsorted(left, step / 2), above)
    clipped = m2[lowest] - 2 * los * m1[lowest] + los**2 * m0[lowest]
    clipped += m2[-1] - m2[above] - 2 * his * (m1[-1] - m1[above]) + his**2 * (m0[-1] - m0[above])
    rounded = m0[above] - m0[lowest] - (m0[stop] - m0[start])
    return np.asarray(np.maximum(clipped, 0) + m2[stop] - m2[start] + step**2 / 12 * rounded)


def step_of(lo: Any, hi: Any, grid: Grid) -> Any:
    """The scale of these ends (floats or arrays), before it is made a float32."""
    if grid.symmetric:
        return np.maximum(-lo, hi) / (grid.qmax - grid.middle)
    return (hi - lo) / (grid.qmax - grid.qmin)

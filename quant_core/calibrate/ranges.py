"""The range of real values that a tensor's integers cover, by one of several methods.

Every method reads the same statistic, so that methods are compared without another inference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quant_core.calibrate.stats import TensorStats
from quant_core.errors import DataError
from quant_core.fields import one_of
from quant_core.numerics.affine import Grid, choose_params

Array = NDArray[np.float64]
Range = tuple[float, float]

# Values of a tensor with which its extremes are taken as they are: about those of one image
# or text. With fewer, `auto` expects more. Not tuned.
ENOUGH_VALUES = 8192
TAIL = 0.02  # the share of values whose spread tells how extremes grow; not tuned
_PERCENTILES = (99.9, 99.99, 99.999)  # that `auto` tries besides the requested one; not tuned
_THRESHOLDS = 32  # that entropy tries, and half as many around the best of them; not tuned
_STEPS = (0.1, 0.05, 0.02, 0.01, 0.005, 0.002)  # by which mse moves the ends; not tuned
# An entropy range whose expected error is more than so many times that of minmax is refused; the
# divergence is misled by ragged histograms of few samples then. Not tuned.
_MAX_ENTROPY_ERROR = 2.0
# `auto` clips where minmax's expected error is more than so many times that of a clipped range:
# what is clipped was seen in few samples, and another may be full of it. Not tuned.
CLIPPING_GAIN = 2.0


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


def find_range(
    stats: TensorStats, grid: Grid, method: str = "auto", percentile: float = 99.99
) -> Range:
    """The range (lo, hi), zero included, that `method` chooses for integers of `grid`.

    `auto` takes the range of all values unless that of another method has less than 1 /
    CLIPPING_GAIN of its expected error, then the one with the least; and adds what few values let
    expect of more.

    Raises: RequestError for an unknown method, DataError if calibration saw no value of the tensor.
    """
    one_of("method", method, ("auto", *RANGE_METHODS))
    if not stats.counts.size:
        raise DataError(
            "calibration saw no value of this tensor", hint="Give samples that reach it"
        )
    if method == "auto":
        lo, hi = _least_error_range(stats, grid, percentile)
        below, above = expected_growth(stats)
        largest = float(np.finfo(np.float32).max)
        grown_lo = max(lo - below, -largest) if lo < 0 else lo
        return grown_lo, min(hi + above, largest) if hi > 0 else hi
    return RANGE_METHODS[method](stats, grid, percentile)


@dataclass(slots=True)
class RangeCache:
    """Ranges that were found already, so that plans with the same calibration find each once.

    Finding one takes some ten milliseconds, and a search applies many plans. A statistic is known
    by its identity, so it must not be updated any more.
    """

    _found: dict[tuple[int, Grid, str, float], tuple[TensorStats, Range]] = field(
        default_factory=dict
    )

    def find(self, stats: TensorStats, grid: Grid, method: str, percentile: float) -> Range:
        """As `find_range`, with the same errors."""
        key = (id(stats), grid, method, percentile)
        if key not in self._found:
            # the statistic is kept with its range, so that no other one can get its id
            self._found[key] = (stats, find_range(stats, grid, method, percentile))
        return self._found[key][1]


def minmax_range(stats: TensorStats, grid: Grid, percentile: float) -> Range:
    """The range of all values."""
    return min(stats.lo, 0.0), max(stats.hi, 0.0)


def percentile_range(stats: TensorStats, grid: Grid, percentile: float) -> Range:
    """A range that at most (100 - percentile) % of the values exceed at either end.

    A percentile of 100 is minmax, exactly.
    """
    histogram = Histogram.of(stats)
    seen = np.concatenate([[0], np.cumsum(histogram.counts)])
    share = percentile / 100 * seen[-1]
    lo, hi = np.interp([seen[-1] - share, share], seen, histogram.edges)
    return min(float(lo), 0.0), max(float(hi), 0.0)


def entropy_range(stats: TensorStats, grid: Grid, percentile: float) -> Range:
    """The range [max(lo, -T), min(hi, T)] whose threshold T keeps most information.

    That is the least Kullback-Leibler divergence of the clipped histogram from the quantized one.
    Unlike TensorRT's, a range need not lie around zero, and a threshold is refused if it costs
    several times minmax's error: few samples make a ragged histogram, whose teeth the divergence
    takes for information.

    Source: S. Migacz, "8-bit inference with TensorRT", GTC 2017.
    """
    whole = Histogram.of(stats)
    histogram = whole.halved()
    lo, hi = minmax_range(stats, grid, percentile)
    levels = grid.qmax - grid.qmin + 1
    reach = max(-lo, hi)
    # with less than a bin for each level nothing is merged, and the divergence falls by itself
    least = levels * 2 * stats.width / (1 if lo == 0 or hi == 0 else 2)
    if least >= reach or histogram.counts.size <= levels:
        return lo, hi

    def divergences(thresholds: Array) -> dict[float, float]:
        found = {}
        for t in thresholds.clip(least, reach).tolist():
            low, high = max(lo, -t), min(hi, t)
            found[t] = kl_divergence(histogram, low, high, _step(low, high, grid))
        return found

    tried = divergences(np.linspace(least, reach, _THRESHOLDS))
    best = min(tried, key=tried.__getitem__)
    spacing = (reach - least) / _THRESHOLDS
    tried |= divergences(np.linspace(best - spacing, best + spacing, _THRESHOLDS // 2))
    limit = _MAX_ENTROPY_ERROR * expected_errors(whole, np.array([lo]), np.array([hi]), grid)
    for threshold in sorted(tried, key=lambda t: (tried[t], -t))[:_THRESHOLDS]:
        low, high = max(lo, -threshold), min(hi, threshold)
        if expected_errors(whole, np.array([low]), np.array([high]), grid) <= limit:
            return low, high
    return lo, hi


def mse_range(stats: TensorStats, grid: Grid, percentile: float) -> Range:
    """The range with the least expected squared error, which is never more than minmax's.

    1. The best of some thousand pairs of ends by a rough error, in which rounding costs
       scale ** 2 / 12 for each value that is not rounded to zero.
    2. From there, and from minmax, ever smaller steps of both ends by the exact error.
    """
    histogram = Histogram.of(stats)
    lo, hi = minmax_range(stats, grid, percentile)
    shares = np.concatenate([np.linspace(1, 1 / 40, 40), np.geomspace(1 / 45, 2.0**-12, 24)])

    # 1
    if grid.symmetric:
        his = shares * max(-lo, hi)
        los = -his
    else:
        his, los = _pairs(shares * hi, shares * lo)
    rough = int(np.argmin(_rough_errors(histogram, los, his, grid)))

    # 2
    best = _least((lo, los[rough]), (hi, his[rough]), histogram, grid)
    for step in _STEPS:
        around = np.array([1, 1 - step, 1 + step])
        best = _least(
            np.maximum(best[0] * around, lo), np.minimum(best[1] * around, hi), histogram, grid
        )
    return best


RANGE_METHODS: dict[str, Callable[[TensorStats, Grid, float], Range]] = {
    "minmax": minmax_range,
    "percentile": percentile_range,
    "entropy": entropy_range,
    "mse": mse_range,
}


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


def expected_growth(stats: TensorStats) -> Range:
    """By how much the minimum is expected to fall, and the maximum to rise, until ENOUGH_VALUES.

    Values beyond a quantile are spread about exponentially there: with a mean excess of m over it,
    the largest of k times as many values is expected to be m ln k larger. 0 with enough values.

    Source: Coles 2001, An Introduction to Statistical Modeling of Extreme Values, section 4.2, for
    a shape of 0.
    """
    if stats.count >= ENOUGH_VALUES:
        return 0.0, 0.0
    growth = float(np.log(ENOUGH_VALUES / stats.count))
    histogram = Histogram.of(stats)
    points = (histogram.edges[1:] + histogram.edges[:-1]) / 2
    below = _mean_excess(-points[::-1], histogram.counts[::-1])
    return growth * below, growth * _mean_excess(points, histogram.counts)


def _mean_excess(points: Array, counts: Array) -> float:
    """By how much the values of the upper tail are beyond its begin, on average.

    points  (bins,), ascending; counts  (bins,), of values there
    """
    beyond = counts.sum() - np.cumsum(counts)
    begin = points[np.argmax(beyond <= TAIL * counts.sum())]
    excess = np.maximum(points - begin, 0)
    return float(excess @ counts / max(counts[excess > 0].sum(), 1))


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


def _least_error_range(stats: TensorStats, grid: Grid, percentile: float) -> Range:
    """The range with the least expected error, by any method, that of minmax divided by
    CLIPPING_GAIN; of equal ones that of the simplest.

    Entropy is left out: it minimizes something else, so that it cannot beat mse by this error.
    """
    methods = [method for name, method in RANGE_METHODS.items() if name != "entropy"]
    ranges = [method(stats, grid, percentile) for method in methods]
    ranges += [percentile_range(stats, grid, p) for p in _PERCENTILES if p != percentile]
    los, his = np.array(ranges).T
    errors = expected_errors(Histogram.of(stats), los, his, grid)
    errors[0] /= CLIPPING_GAIN  # minmax is the first method
    return ranges[int(np.argmin(errors))]


def _rough_errors(histogram: Histogram, los: Array, his: Array, grid: Grid) -> Array:
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
    step = _step(los, his, grid)
    lowest = np.searchsorted(left, los)
    above = np.searchsorted(left, his)
    # the bins from `start` to `stop` round to zero
    start = np.maximum(np.searchsorted(left, -step / 2), lowest)
    stop = np.minimum(np.searchsorted(left, step / 2), above)
    clipped = m2[lowest] - 2 * los * m1[lowest] + los**2 * m0[lowest]
    clipped += m2[-1] - m2[above] - 2 * his * (m1[-1] - m1[above]) + his**2 * (m0[-1] - m0[above])
    rounded = m0[above] - m0[lowest] - (m0[stop] - m0[start])
    return np.asarray(np.maximum(clipped, 0) + m2[stop] - m2[start] + step**2 / 12 * rounded)


def _step(lo: Any, hi: Any, grid: Grid) -> Any:
    """The scale of these ends (floats or arrays), before it is made a float32."""
    if grid.symmetric:
        return np.maximum(-lo, hi) / (grid.qmax - grid.middle)
    return (hi - lo) / (grid.qmax - grid.qmin)


def _least(los: Iterable[float], his: Iterable[float], histogram: Histogram, grid: Grid) -> Range:
    """The pair of a lower and an upper end with the least error, the first of equal ones."""
    low, high = _pairs(los, his)
    at = int(np.argmin(expected_errors(histogram, low, high, grid)))
    return float(low[at]), float(high[at])


def _pairs(some: Iterable[float], others: Iterable[float]) -> tuple[Array, Array]:
    """Each of the one with each of the other, and every pair once: where all values have one sign,
    one end of a range is 0 however it is moved.
    """
    different = [np.array(list(dict.fromkeys(ends))) for ends in (some, others)]
    one, other = np.meshgrid(*different, indexing="ij")
    return one.ravel(), other.ravel()

"""The range of real values that a tensor's integers cover, by one of several methods.

Every method reads the same statistic, so that methods are compared without another inference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

from quant_core.calibrate.range_errors import (
    Array,
    Histogram,
    Range,
    expected_errors,
    kl_divergence,
    rough_errors,
    step_of,
)
from quant_core.calibrate.stats import TensorStats
from quant_core.errors import DataError
from quant_core.fields import one_of
from quant_core.numerics.affine import Grid

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
            found[t] = kl_divergence(histogram, low, high, step_of(low, high, grid))
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
    rough = int(np.argmin(rough_errors(histogram, los, his, grid)))

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

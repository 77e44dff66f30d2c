"""Which range of a tensor its integers cover: every method reads the same statistic, so no inference runs twice."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from quant_core.calibrate.stats import TensorStats
from quant_core.config import METHODS, one_of
from quant_core.errors import DataError
from quant_core.numerics.affine import Grid, choose_params

Array = NDArray[np.float64]
Range = tuple[float, float]

_PERCENTILES = (99.9, 99.99, 99.999)  # that `auto` tries besides the one asked for
_THRESHOLDS = 32  # that entropy tries, and half as many around the best of them
_STEPS = (0.1, 0.05, 0.02, 0.01, 0.005, 0.002)  # by which mse moves the ends
_REFUSED = 2.0  # times the error of minmax: an entropy range that costs more is a collapse, not a calibration


@dataclass(frozen=True, slots=True)
class RangeChoice:
    """A range, who proposed it, and the mean squared error it is expected to cost."""

    method: str
    lo: float
    hi: float
    error: float


def find_range(
    stats: TensorStats, grid: Grid, method: str = "auto", percentile: float = 99.99
) -> Range:
    """The range, zero included, that `method` chooses; `auto` takes the one with the least expected error.

    Raises: RequestError for an unknown method, DataError if calibration saw no value of the tensor.
    """
    one_of("method", method, ("auto", *RANGE_METHODS))
    _check_seen(stats)
    if (
        method == "auto"
    ):  # entropy looks at other things: by the expected error, it cannot win over mse
        best = rank_ranges(stats, grid, percentile, RANGE_METHODS.keys() - {"entropy"})[0]
        return best.lo, best.hi
    return RANGE_METHODS[method](stats, grid, percentile)


def rank_ranges(
    stats: TensorStats, grid: Grid, percentile: float = 99.99, among: Collection[str] = METHODS
) -> list[RangeChoice]:
    """These methods' ranges, the least expected error first; of equal ones the simpler method. Raises: DataError."""
    _check_seen(stats)
    ranges = [
        (name, method(stats, grid, percentile))
        for name, method in RANGE_METHODS.items()
        if name in among
    ]
    ranges += [
        ("percentile", percentile_range(stats, grid, p)) for p in _PERCENTILES if p != percentile
    ]
    los, his = np.array([r for _, r in ranges]).T
    errors = _expected_errors(_Histogram.of(stats), los, his, grid)
    choices = [
        RangeChoice(name, lo, hi, float(e))
        for (name, (lo, hi)), e in zip(ranges, errors, strict=True)
    ]
    return sorted(choices, key=lambda choice: choice.error)


def expected_error(stats: TensorStats, lo: float, hi: float, grid: Grid) -> float:
    """Mean squared difference between the tensor and what [lo, hi] on `grid` makes of it: rounding and clipping.

    Values count as spread evenly over their bin. The common yardstick of all methods. Raises: DataError.
    """
    _check_seen(stats)
    return float(_expected_errors(_Histogram.of(stats), np.array([lo]), np.array([hi]), grid)[0])


def minmax_range(stats: TensorStats, grid: Grid, percentile: float) -> Range:
    """All that was seen."""
    return min(stats.lo, 0.0), max(stats.hi, 0.0)


def percentile_range(stats: TensorStats, grid: Grid, percentile: float) -> Range:
    """At most (100 - percentile) % of the values lie above, and as many below; 100 is minmax, exactly."""
    histogram = _Histogram.of(stats)
    seen = np.concatenate([[0], np.cumsum(histogram.counts)])
    share = percentile / 100 * seen[-1]
    lo, hi = np.interp([seen[-1] - share, share], seen, histogram.edges)
    return min(float(lo), 0.0), max(float(hi), 0.0)


def entropy_range(stats: TensorStats, grid: Grid, percentile: float) -> Range:
    """The threshold T whose range [max(lo, -T), min(hi, T)] keeps most information, by Kullback-Leibler divergence.

    Unlike TensorRT's, it knows that a range need not lie around zero, and refuses a threshold that costs several
    times minmax's error: few samples make a ragged histogram, whose teeth the divergence takes for information.
    Source: S. Migacz, "8-bit inference with TensorRT", GTC 2017.
    """
    whole = _Histogram.of(stats)
    histogram = whole.halved()
    lo, hi = minmax_range(stats, grid, percentile)
    levels, reach = grid.qmax - grid.qmin + 1, max(-lo, hi)
    # below a bin a level there is nothing left to merge, and the divergence falls by itself
    least = levels * 2 * stats.width / (1 if lo == 0 or hi == 0 else 2)
    if least >= reach or histogram.counts.size <= levels:
        return lo, hi

    def divergences(thresholds: Array) -> dict[float, float]:
        ends = ((t, max(lo, -t), min(hi, t)) for t in thresholds.clip(least, reach).tolist())
        return {
            t: _divergence(histogram, low, high, _step(low, high, grid)) for t, low, high in ends
        }

    tried = divergences(np.linspace(least, reach, _THRESHOLDS))
    best, apart = min(tried, key=tried.__getitem__), (reach - least) / _THRESHOLDS
    tried |= divergences(np.linspace(best - apart, best + apart, _THRESHOLDS // 2))
    limit = _REFUSED * _expected_errors(whole, np.array([lo]), np.array([hi]), grid)
    for threshold in sorted(tried, key=lambda t: (tried[t], -t))[:_THRESHOLDS]:
        low, high = max(lo, -threshold), min(hi, threshold)
        if _expected_errors(whole, np.array([low]), np.array([high]), grid) <= limit:
            return low, high
    return lo, hi


def mse_range(stats: TensorStats, grid: Grid, percentile: float) -> Range:
    """The pair of ends with the least expected squared error, which is never more than minmax's.

    1. Of some thousand pairs the best, each value's rounding taken as scale ** 2 / 12, if not to zero.
    2. From there, and from minmax, ever smaller steps of both ends by the exact error.
    """
    histogram = _Histogram.of(stats)
    lo, hi = minmax_range(stats, grid, percentile)
    shares = np.concatenate([np.linspace(1, 1 / 40, 40), np.geomspace(1 / 45, 2.0**-12, 24)])

    # 1
    if grid.symmetric:
        his = shares * max(-lo, hi)
        los = -his
    else:
        los, his = (end.ravel() for end in np.meshgrid(shares * lo, shares * hi))
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


@dataclass(frozen=True, slots=True, eq=False)
class _Histogram:
    """The statistic as numbers to compute with; the outermost edges are the exact minimum and maximum."""

    edges: Array  # (bins + 1,)
    counts: Array  # (bins,)

    @classmethod
    def of(cls, stats: TensorStats) -> _Histogram:
        edges = (
            np.arange(stats.first, stats.first + stats.counts.size + 1, dtype=np.float64)
            * stats.width
        )
        edges[0], edges[-1] = stats.lo, stats.hi
        return cls(edges, stats.counts.astype(np.float64))

    def halved(self) -> _Histogram:
        """The same in half as many bins."""
        starts = np.arange(0, self.counts.size, 2)
        return _Histogram(
            np.append(self.edges[starts], self.edges[-1]), np.add.reduceat(self.counts, starts)
        )


def _expected_errors(histogram: _Histogram, los: Array, his: Array, grid: Grid) -> Array:
    """(K,) mean squared errors of K ranges."""
    params = choose_params(los, his, grid, axis=0)
    zero = params.zero_point.astype(np.float64)[:, None]
    # The integral of (x - nearest level) ** 2, in steps: 1/12 for every whole step passed, d ** 3 / 3 for the rest.
    # Beyond the last level d grows on, and the same term is the clipping error.
    x = histogram.edges / params.scale.astype(np.float64)[:, None]
    levels = np.clip(np.rint(x), grid.qmin - zero, grid.qmax - zero)
    d = x - levels
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.diff(levels / 12 + d * d * d / 3) / np.diff(x)
    mean = np.where(
        np.diff(x) > 0, np.maximum(mean, 0), d[:, 1:] ** 2
    )  # a bin without width holds one value
    return np.asarray(
        mean @ histogram.counts / histogram.counts.sum() * params.scale.astype(np.float64) ** 2
    )


def _rough_errors(histogram: _Histogram, los: Array, his: Array, grid: Grid) -> Array:
    """(K,) mean squared errors of K ranges, from cumulated moments: fast, and right up to a bin at every border."""
    left, right, share = (
        histogram.edges[:-1],
        histogram.edges[1:],
        histogram.counts / histogram.counts.sum(),
    )
    powers = (
        np.ones_like(left),
        (left + right) / 2,
        (left * left + left * right + right * right) / 3,
    )
    m0, m1, m2 = (np.concatenate([[0], np.cumsum(share * power)]) for power in powers)
    step = _step(los, his, grid)
    lowest, above = np.searchsorted(left, los), np.searchsorted(left, his)
    start, stop = (
        np.searchsorted(left, -step / 2),
        np.searchsorted(left, step / 2),
    )  # what rounds to zero
    start, stop = np.maximum(start, lowest), np.minimum(stop, above)
    clipped = m2[lowest] - 2 * los * m1[lowest] + los**2 * m0[lowest]
    clipped += m2[-1] - m2[above] - 2 * his * (m1[-1] - m1[above]) + his**2 * (m0[-1] - m0[above])
    rounded = m0[above] - m0[lowest] - (m0[stop] - m0[start])
    return np.asarray(np.maximum(clipped, 0) + m2[stop] - m2[start] + step**2 / 12 * rounded)


def _step(lo: Any, hi: Any, grid: Grid) -> Any:
    """The scale of these ends (floats or arrays), before it is made a float32."""
    return (
        np.maximum(-lo, hi) / (grid.qmax - grid.middle)
        if grid.symmetric
        else (hi - lo) / (grid.qmax - grid.qmin)
    )


def _least(los: ArrayLike, his: ArrayLike, histogram: _Histogram, grid: Grid) -> Range:
    """Of all pairs of a lower and an upper end the one with the least error, the first of equal ones."""
    low, high = (end.ravel() for end in np.meshgrid(los, his, indexing="ij"))
    at = int(np.argmin(_expected_errors(histogram, low, high, grid)))
    return float(low[at]), float(high[at])


def _divergence(histogram: _Histogram, lo: float, hi: float, step: float) -> float:
    """KL divergence, in nats, of the clipped histogram from what levels `step` apart can tell of it."""
    middles = (histogram.edges[1:] + histogram.edges[:-1]) / 2
    start, stop = np.searchsorted(middles, lo), np.searchsorted(middles, hi, "right")
    inside = histogram.counts[start:stop]
    if not inside.any():
        return np.inf
    clipped = inside.copy()
    clipped[0] += histogram.counts[:start].sum()
    clipped[-1] += histogram.counts[stop:].sum()
    filled = clipped > 0
    # every level shares its mass among its bins that are not empty; what was clipped is not known to the levels
    levels = np.rint(middles[start:stop] / step)
    runs = np.flatnonzero(np.diff(levels, prepend=-np.inf))
    mass, bins = np.add.reduceat(inside, runs), np.add.reduceat(filled.astype(np.float64), runs)
    told = np.repeat(mass / np.maximum(bins, 1), np.diff(runs, append=levels.size))[filled]
    if not told.all():
        return np.inf
    p, q = clipped[filled] / clipped.sum(), told / told.sum()
    return float(np.sum(p * np.log(p / q)))


def _check_seen(stats: TensorStats) -> None:
    if not stats.counts.size:
        raise DataError(
            "calibration saw no value of this tensor", hint="Give samples that reach it"
        )

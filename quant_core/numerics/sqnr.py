"""Signal to quantization noise, in dB."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quant_core.metrics import MAX_SQNR_DB

LEAST_VARIATION = 1e-4  # of a mean: values that vary around it by less are constant
_LEAST_SIGNAL = 1e-300  # a signal of zero has no logarithm
_CONFIDENT = 1.645  # standard deviations that 95 % of a normal distribution lie below
_OTHERS = 8  # samples that people try a model on, at least


def sqnr_db(signal: float, noise: float) -> float:
    """10 log10(signal / noise), with both as sums of squares; MAX_SQNR_DB without noise."""
    if not noise:
        return MAX_SQNR_DB
    return 10 * math.log10(max(signal, _LEAST_SIGNAL) / noise)


def difference_db(a: NDArray[Any], b: NDArray[Any], no_noise: float) -> float:
    """What `b` is worth as a copy of the floats `a`, in dB: infinite if it is the same, -infinite
    if it has another shape, or if some numbers are finite in one of them only.

    no_noise  mean square error that counts as none: near zero a ratio means nothing
    """
    finite = np.isfinite(a)
    if a.shape != b.shape or not np.array_equal(finite, np.isfinite(b)):
        return -math.inf
    x, y = a[finite].astype(np.float64), b[finite]
    noise = float(np.square(x - y).sum())
    return math.inf if noise <= no_noise * x.size else sqnr_db(float(np.square(x).sum()), noise)


def within_limits(db: float) -> float:
    """The ratio, or the nearest one that is reported: from -MAX_SQNR_DB to MAX_SQNR_DB."""
    return max(-MAX_SQNR_DB, min(MAX_SQNR_DB, db))


def lower_sqnr_db(signals: NDArray[np.float64], noises: NDArray[np.float64]) -> float:
    """Lower bound, with 95 % confidence, of the SQNR that _OTHERS more samples will have.

    signals, noises  (n,) sums of squares of each sample; of one sample it is its own SQNR

    The mean noise of the others differs from that of these samples for two reasons: these are few,
    and the others are few as well.

    Source: Cochran, Sampling Techniques, 3rd ed., section 6.4: the variance of a ratio of two sums
    is that of the residuals y - ratio * x. Hahn and Meeker, Statistical Intervals, section 4.7: the
    mean of m future values lies within z s sqrt(1 / n + 1 / m) of the mean of n values, s being
    their standard deviation and z that of the confidence.
    """
    count = len(signals)
    more = _CONFIDENT * count * _deviation(signals, noises) * math.sqrt(1 / count + 1 / _OTHERS)
    return sqnr_db(float(signals.sum()), float(noises.sum()) + more)


def decisions_db(total: float, differing: float) -> float:
    """What decisions count as in dB: 20 log10(all / differing); one that differs counts as luck.

    A decision changes where its margin is smaller than the noise. Margins near zero are about
    equally frequent, so the share that changes grows with the amplitude of the noise.
    """
    return 2 * sqnr_db(total, max(0.0, differing - 1))


def upper_decisions_db(totals: NDArray[np.float64], differing: NDArray[np.float64]) -> float:
    """Upper bound, with 95 % confidence, of the `decisions_db` of many samples of the same kind.

    totals, differing  (n,) decisions of each sample, and how many of them differ

    Source: Cochran, section 9.6: decisions of one sample depend on each other, so the standard
    error is that between samples.
    """
    luck = _CONFIDENT * math.sqrt(len(totals)) * _deviation(totals, differing)
    return decisions_db(float(totals.sum()), float(differing.sum()) - max(0.0, luck - 1))


def _deviation(signals: NDArray[np.float64], noises: NDArray[np.float64]) -> float:
    """Standard deviation of the residuals noise - ratio * signal, with the ratio of both sums.

    0 of one sample, or without signals.
    """
    signal, count = float(signals.sum()), len(signals)
    if not signal or count < 2:
        return 0.0
    left = noises - float(noises.sum()) / signal * signals
    return math.sqrt(float(left @ left) / (count - 1))

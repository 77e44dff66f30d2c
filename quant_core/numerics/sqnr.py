"""Signal to quantization noise, in dB."""

from __future__ import annotations

import math

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


def within_limits(db: float) -> float:
    """The ratio, or the nearest one that is reported: from -MAX_SQNR_DB to MAX_SQNR_DB."""
    return max(-MAX_SQNR_DB, min(MAX_SQNR_DB, db))


def lower_sqnr_db(signals: NDArray[np.float64], noises: NDArray[np.float64]) -> float:
    """What the SQNR of a few other samples is not below, with 95 % confidence.

    signals, noises  (n,) sums of squares of each sample; of one sample nothing else is expected

    The noise of others differs from the mean of these both since these are few and since they are.

    Source: Cochran, Sampling Techniques, 3rd ed., section 6.4: the ratio of two sums has the
    variance of what is left where that ratio of the one is taken from the other. Hahn and Meeker,
    Statistical Intervals, section 4.7: the mean of m future values lies within a standard deviation
    times sqrt(1 / n + 1 / m) of that of n values, as often as the factor before it says.
    """
    count = len(signals)
    more = _CONFIDENT * count * _deviation(signals, noises) * math.sqrt(1 / count + 1 / _OTHERS)
    return sqnr_db(float(signals.sum()), float(noises.sum()) + more)


def decisions_db(total: float, differing: float) -> float:
    """What decisions count as in dB: 20 log10 of all over those that differ, less one that is luck.

    A decision changes where its margin is smaller than the noise. Margins near zero are about
    equally frequent, so the share that changes grows with the amplitude of the noise.
    """
    return 2 * sqnr_db(total, max(0.0, differing - 1))


def upper_decisions_db(totals: NDArray[np.float64], differing: NDArray[np.float64]) -> float:
    """What more decisions of the same kind are not below, unless these are worse than 95 % of such.

    totals, differing  (n,) numbers of decisions of each sample, and of those that differ

    Source: Cochran, section 9.6: decisions of one sample depend on each other, so that samples are
    what the error of the share is taken over.
    """
    luck = _CONFIDENT * math.sqrt(len(totals)) * _deviation(totals, differing)
    return decisions_db(float(totals.sum()), float(differing.sum()) - max(0.0, luck - 1))


def _deviation(signals: NDArray[np.float64], noises: NDArray[np.float64]) -> float:
    """The standard deviation of what is left of noises without the share of signals that all have
    on average; 0 of one sample, or without signals.
    """
    signal, count = float(signals.sum()), len(signals)
    if not signal or count < 2:
        return 0.0
    left = noises - float(noises.sum()) / signal * signals
    return math.sqrt(float(left @ left) / (count - 1))

"""Signal to quantization noise, in dB."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from quant_core.metrics import MAX_SQNR_DB

_LEAST_SIGNAL = 1e-300  # a signal of zero has no logarithm
_CONFIDENT = 1.645  # standard deviations that 95 % of a normal distribution lie below
_OTHERS = 8  # samples that people try a model on, at least


def sqnr_db(signal: float, noise: float) -> float:
    """10 log10(signal / noise), with both as sums of squares; MAX_SQNR_DB without noise."""
    if not noise:
        return MAX_SQNR_DB
    return 10 * math.log10(max(signal, _LEAST_SIGNAL) / noise)


def lower_sqnr_db(signals: NDArray[np.float64], noises: NDArray[np.float64]) -> float:
    """What the SQNR of a few other samples is not below, with 95 % confidence.

    signals, noises  (n,) sums of squares of each sample; of one sample nothing else is expected

    The noise of others differs from the mean of these both since these are few and since they are.

    Source: Cochran, Sampling Techniques, 3rd ed., section 6.4: the ratio of two sums has the
    variance of what is left where that ratio of the one is taken from the other. Hahn and Meeker,
    Statistical Intervals, section 4.7: the mean of m future values lies within a standard deviation
    times sqrt(1 / n + 1 / m) of that of n values, as often as the factor before it says.
    """
    signal, noise, count = float(signals.sum()), float(noises.sum()), len(signals)
    if signal and count > 1:
        left = noises - noise / signal * signals
        deviation = math.sqrt(float(left @ left) / (count - 1))
        noise += _CONFIDENT * count * deviation * math.sqrt(1 / count + 1 / _OTHERS)
    return sqnr_db(signal, noise)

"""Signal to quantization noise, in dB."""

from __future__ import annotations

import math

from quant_core.metrics import MAX_SQNR_DB

_LEAST_SIGNAL = 1e-300  # a signal of zero has no logarithm


def sqnr_db(signal: float, noise: float) -> float:
    """10 log10(signal / noise), with both as sums of squares; MAX_SQNR_DB without noise."""
    if not noise:
        return MAX_SQNR_DB
    return 10 * math.log10(max(signal, _LEAST_SIGNAL) / noise)

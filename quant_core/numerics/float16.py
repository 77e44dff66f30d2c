"""Which float numbers float16 can hold, so that weights that stay float take half the bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

# float16 keeps 11 bits, about 70 dB, of numbers within its range; less tells that some are not.
MIN_SQNR_DB = 60.0
OVERFLOW = 65520.0  # the least number that rounds to infinity
FLOAT16 = "float16"


def why_not_float16(array: NDArray[Any]) -> str:
    """Why float16 cannot hold these numbers, "" if it can."""
    peak = float(np.abs(array).max(initial=0.0))
    if not peak < OVERFLOW:
        return f"values up to {peak:.2g} overflow float16"
    noise = float(np.square(array - array.astype(np.float16), dtype=np.float64).sum())
    signal = float(np.square(array, dtype=np.float64).sum())
    if noise > signal * 10 ** (-MIN_SQNR_DB / 10):
        return f"values of at most {peak:.2g} are too small for float16"
    return ""


def is_float16(array: NDArray[Any]) -> bool:
    """Whether float16 holds each of these numbers exactly."""
    with np.errstate(over="ignore"):
        return bool(np.array_equal(array, array.astype(np.float16), equal_nan=True))

"""Which weights can overflow the int16 sums of x86 CPUs without VNNI, and how close ones that
cannot look.

vpmaddubsw multiplies uint8 activations by int8 weights and adds neighbours in saturating int16.
With activations up to 255, neighbours (2k, 2k + 1) along the reduction axis are safe for every
input if and only if their positive weights sum to at most 128 and their negative ones to at least
-128: 255 * 128 = 32640 <= 32767 < 255 * 129.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

PAIR_LIMIT = 128
HALF_PAIR = PAIR_LIMIT // 2  # any two weights up to this are a safe pair


def unsafe_pairs(q: NDArray[Any]) -> NDArray[np.intp]:
    """(row, pair) of every unsafe pair of `q`, int8 (C, K), K in the kernel's order: (n, 2)."""
    first, second = _pairs(q.astype(np.int16))
    return np.argwhere(np.abs(first + second) > PAIR_LIMIT)  # of unlike signs none exceeds 127


def make_safe(q: NDArray[np.int8]) -> NDArray[np.int8]:
    """The nearest safe weights: where two of one sign exceed the limit, both give up half of the
    excess.

    (C, K) in the kernel's order; the result is proven safe (no input can saturate).
    """
    safe = q.copy()
    first, second = _pairs(q)
    together = np.add(first, second, dtype=np.int16)
    at = np.nonzero(np.abs(together) > PAIR_LIMIT)  # two of one sign: others sum to 127 at most
    a, b = (np.abs(x[at].astype(np.int16)) for x in (first, second))
    excess = a + b - PAIR_LIMIT
    from_larger = (excess + 1) // 2
    from_first = np.where(b > a, excess - from_larger, from_larger)
    sign = np.sign(together[at])
    safe_first, safe_second = _pairs(safe)  # views
    safe_first[at] = sign * (a - from_first)
    safe_second[at] = sign * (b - (excess - from_first))
    return safe


def safe_scale(weights: NDArray[Any]) -> NDArray[np.float64]:
    """Per row of (C, K), the least scale at which every pair is safe before it is rounded."""
    first, second = _pairs(np.asarray(weights, np.float64))
    up = np.maximum(first, 0) + np.maximum(second, 0)
    down = np.maximum(-first, 0) + np.maximum(-second, 0)
    paired = np.maximum(up, down).max(1, initial=0.0)
    alone = np.abs(weights[:, -1:]).max(1, initial=0.0)  # of an odd number of columns
    return np.asarray(np.maximum(paired, alone) / PAIR_LIMIT)


def make_any_pair_safe(q: NDArray[np.int8]) -> NDArray[np.int8]:
    """The nearest weights of which any two of a row are safe, whichever a kernel adds up."""
    return np.clip(q, -HALF_PAIR, HALF_PAIR)


def scale_for_any_pair(weights: NDArray[Any]) -> NDArray[Any]:
    """Per row of (C, K), the least scale at which any two weights are safe before rounding."""
    return np.asarray(np.abs(weights).max(1, initial=0.0) / HALF_PAIR)


def _pairs(rows: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """The first and the second weight of each pair, views (C, K // 2): an odd last one has none."""
    even = rows.shape[1] // 2 * 2
    return rows[:, 0:even:2], rows[:, 1:even:2]

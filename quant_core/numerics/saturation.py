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


def unsafe_pairs(q: NDArray[Any]) -> NDArray[np.intp]:
    """(row, pair) of every unsafe pair of `q`, int8 (C, K), K in the kernel's order: (n, 2)."""
    pairs = _pairs(q)
    up, down = np.maximum(pairs, 0).sum(2), np.minimum(pairs, 0).sum(2)
    return np.argwhere((up > PAIR_LIMIT) | (down < -PAIR_LIMIT))


def make_safe(q: NDArray[np.int8]) -> NDArray[np.int8]:
    """The nearest safe weights: where two of one sign exceed the limit, both give up half of the
    excess.

    (C, K) in the kernel's order; the result is proven safe (no input can saturate).
    """
    pairs = _pairs(q)
    magnitude = np.abs(pairs)
    together = (np.sign(pairs[..., 0]) * np.sign(pairs[..., 1])) > 0
    excess = np.where(together, np.maximum(magnitude.sum(2) - PAIR_LIMIT, 0), 0)
    half = (excess + 1) // 2
    larger = (magnitude[..., 1] > magnitude[..., 0]).astype(np.int16)
    first = half * (1 - larger) + (excess - half) * larger
    magnitude = magnitude - np.stack([first, excess - first], axis=2)
    safe = np.sign(pairs) * magnitude
    return np.ascontiguousarray(safe.reshape(q.shape[0], -1)[:, : q.shape[1]].astype(np.int8))


def safe_scale(weights: NDArray[Any]) -> NDArray[np.float64]:
    """Per row of (C, K), the least scale at which rounding aside every pair is safe."""
    pairs = _pairs(weights, np.float64)
    up, down = np.maximum(pairs, 0).sum(2), -np.minimum(pairs, 0).sum(2)
    return np.asarray(np.maximum(up, down).max(1, initial=0.0) / PAIR_LIMIT)


def _pairs(rows: NDArray[Any], dtype: Any = np.int16) -> NDArray[Any]:
    """(C, ceil(K / 2), 2), an odd last one beside a zero."""
    padded = np.pad(rows, ((0, 0), (0, rows.shape[1] % 2)))
    return padded.astype(dtype).reshape(rows.shape[0], -1, 2)

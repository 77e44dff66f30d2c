"""A weight as integers and scales, in 8 bits or in 4."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from quant_core.numerics.levels import EVEN, Levels

QMAX8 = 127  # int8 weights are symmetric: -128 is not used
MIN_SHORT_SCALES = 64  # with fewer, the Cast behind them takes more bytes than bfloat16 saves


@dataclass(frozen=True, slots=True, eq=False)
class IntegerWeight:
    """int8 rows (C, K) and one scale per row (C,), or () for the whole weight.

    Stored in four bits, q is what `levels` make of blocks, int8 holding -8..7 (C, K), and
    multipliers, uint8 1..15 (C, K / block): their products, if they are even.
    """

    q: NDArray[np.int8]
    scale: NDArray[np.float32]
    blocks: NDArray[np.int8] | None = None
    multipliers: NDArray[np.uint8] | None = None
    levels: Levels = EVEN

    @property
    def values(self) -> NDArray[np.float32]:
        """The numbers that the integers stand for, (C, K)."""
        scale = self.scale[:, None] if self.scale.ndim else self.scale
        return self.q.astype(np.float32) * scale


def bfloat16(scale: NDArray[np.float32]) -> NDArray[np.float32]:
    """The next bfloat16 number that is no smaller: scales beside 4-bit weights are stored in 16
    bits.
    """
    bits = scale.view(np.uint32) + np.uint32(0xFFFF)
    return np.asarray((bits & np.uint32(0xFFFF0000)).view(np.float32))


def with_short_scales(weight: IntegerWeight, floor: NDArray[Any] | float) -> IntegerWeight:
    """The weight with the nearest bfloat16 numbers as scales of its rows, but none below `floor`.

    With fewer than MIN_SHORT_SCALES it stays as it is.
    """
    if weight.scale.size < MIN_SHORT_SCALES:
        return weight
    near = weight.scale.astype(ml_dtypes.bfloat16).astype(np.float32)
    return replace(weight, scale=np.where(near < floor, bfloat16(weight.scale), near))

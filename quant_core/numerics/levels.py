"""Which sixteen int8 numbers the weights of a block may be, that are stored in 4 bits."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

QMIN4, QMAX4 = -8, 7  # int4 weights have no zero point: -8 only rounds further down
MULTIPLIER_MAX = 15  # of a block of int4 weights, stored as uint4
HALF_STEPS = 512  # from -128 on: levels are whole numbers, so the nearest changes at halves alone


@dataclass(frozen=True, slots=True, eq=False)
class Levels:
    """What each multiplier of a block makes of the sixteen integers -8..7 of its weights.

    table  int8 (16, 16): of each multiplier 0..15, ascending, 0 at the integer 0
    """

    table: NDArray[np.int8]
    _nearest: NDArray[np.float32] = field(init=False)
    _up: NDArray[np.float32] = field(init=False)
    _down: NDArray[np.float32] = field(init=False)
    _integers: NDArray[np.int8] = field(init=False)

    def __post_init__(self) -> None:
        between = np.arange(HALF_STEPS) / 2 - 127.75
        whole = np.arange(-128, 128)
        distance = np.abs(between[:, None] - self.table[:, None, :])
        up = [np.searchsorted(levels, whole).clip(max=15) for levels in self.table]
        down = [np.searchsorted(row, whole, "right").clip(1) - 1 for row in self.table]
        for name, index in (("_nearest", distance.argmin(2)), ("_up", up), ("_down", down)):
            found = np.take_along_axis(self.table, np.asarray(index), 1)
            object.__setattr__(self, name, found.astype(np.float32).reshape(-1))
        object.__setattr__(self, "_integers", (np.ravel(up) + QMIN4).astype(np.int8))

    @property
    def reach(self) -> float:
        """The largest number of steps that has a level near it on either side."""
        return float(self.table[-1, -1])

    def nearest(self, steps: NDArray[Any], multipliers: NDArray[Any]) -> NDArray[np.float32]:
        """The levels nearest to these numbers of steps, by multipliers that broadcast."""
        halves = np.minimum(np.maximum(steps + steps, np.float32(-256)), np.float32(255))
        row = multipliers.astype(np.int32) * HALF_STEPS + HALF_STEPS // 2
        return np.asarray(self._nearest.take(np.floor(halves).astype(np.int32) + row, mode="clip"))

    def within(
        self, levels: NDArray[Any], low: NDArray[Any], high: NDArray[Any], multipliers: NDArray[Any]
    ) -> NDArray[np.float32]:
        """The levels nearest to these that lie in low..high, integers of -128..127 around 0."""
        row = multipliers.astype(np.int32) * 256 + 128
        least = self._up.take(low.astype(np.int32) + row)
        most = self._down.take(high.astype(np.int32) + row)
        return np.asarray(np.minimum(np.maximum(levels, least), most))

    def integers(self, levels: NDArray[np.int8], multipliers: NDArray[Any]) -> NDArray[np.int8]:
        """The integers -8..7 that these multipliers, which broadcast, make these levels of."""
        row = multipliers.astype(np.int32) * 256 + 128
        return np.asarray(self._integers.take(levels + row))

    def of(self, integers: NDArray[np.int8], multipliers: NDArray[Any]) -> NDArray[np.int8]:
        """The levels that multipliers, which broadcast, make of integers: `integers` undone."""
        row = multipliers.astype(np.int32) * 16 - QMIN4
        return np.asarray(self.table.take(integers + row))


def _levels(unit: NDArray[Any]) -> Levels:
    """The sixteen levels times each multiplier."""
    multipliers = np.arange(MULTIPLIER_MAX + 1)[:, None]
    return Levels(np.rint(multipliers * unit).astype(np.int8))


EVEN = _levels(np.arange(QMIN4, QMAX4 + 1))  # as DequantizeLinear and MatMulNBits take them
# Dense where normal numbers are: of blocks of 32, each with the multiplier that serves it best, the
# means of those numbers to which each level is nearest, but for a 0. A test shows that they are.
# Source: Lloyd 1982, Least Squares Quantization in PCM (IEEE TIT 28 (2)); Dettmers et al. 2023,
# QLoRA (arXiv 2305.14314), section 3, for weights as normal numbers.
_BELOW = (-8.47, -6.67, -5.29, -4.17, -3.21, -2.32, -1.5, -0.73)
_ABOVE = (0.74, 1.51, 2.34, 3.28, 4.37, 5.69, 7.56)
NORMAL = _levels(np.array((*_BELOW, 0, *_ABOVE)))

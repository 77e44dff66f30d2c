"""Bounds within which the integers of one column of a weight may lie."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from quant_core.numerics.integer_weight import QMAX8
from quant_core.numerics.saturation import PAIR_LIMIT

# As arrays: numpy takes longer to convert a number of Python than to compare a column with it.
LEAST8, MOST8, PAIR = (np.array(x, np.float32) for x in (-QMAX8, QMAX8, PAIR_LIMIT))


class Signs:
    """Bounds that keep the signs and the exact zeros of non-negative rows, as filter banks have.

    What follows such a row, a Log or Sqrt, has no value for a negative sum.
    """

    def __init__(self, rows: NDArray[np.float32]) -> None:
        self.rows = rows
        self.is_positive = rows.min(1, initial=0.0) >= 0
        self.any_positive = bool(self.is_positive.any())
        self.least = np.where(self.is_positive, 0.0, -np.inf).astype(np.float32)

    def keep(self, steps: NDArray[Any], column: int, chosen: Any = ...) -> NDArray[Any]:
        """The integers of this column (C,) within the bounds; `chosen` picks some of the rows."""
        if not self.any_positive:
            return steps
        is_zero = self.is_positive & (self.rows[:, column] == 0)
        most = np.where(is_zero, np.float32(0), np.float32(np.inf))
        return within(steps, self.least[chosen], most[chosen])


def safe_range(neighbour: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """The least and the largest integers that are safe beside these neighbours.

    A neighbour of the other sign leaves more than an integer can use.
    """
    return np.maximum(-PAIR - neighbour, LEAST8), np.minimum(PAIR - neighbour, MOST8)


def within(steps: NDArray[Any], low: Any, high: Any) -> NDArray[Any]:
    """The values clipped to the bounds; numpy.clip takes several times as long on a column."""
    return np.asarray(np.minimum(np.maximum(steps, low), high))

"""Outputs of made-up models, as `compare` reads them."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike


def feeds(*arrays: ArrayLike) -> list[list[np.ndarray]]:
    """One output, one feed per array."""
    return [[np.asarray(array)] for array in arrays]


def rows(array: ArrayLike) -> list[list[np.ndarray]]:
    """One output, one feed per row of the array."""
    array = np.asarray(array)
    return feeds(*(array[i : i + 1] for i in range(len(array))))

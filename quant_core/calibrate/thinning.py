"""Which values of a large tensor are counted, where all would cost too much."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

from numpy.typing import NDArray


def thinned(x: NDArray[Any], channel_axis: int, least: int) -> NDArray[Any]:
    """A grid of an image's or a signal's positions, at least `least` for each channel.

    Neighbours are alike there, so that a grid says nearly as much as all positions. The axes after
    `channel_axis` are thinned; nothing is left out where channels come last. Which positions are
    taken depends on the shape alone, so that the law holds; strides are odd, as even ones would see
    only one row of a pattern that repeats every two.
    """
    return x[_grid(x.shape, channel_axis % x.ndim + 1, least)]


@lru_cache(maxsize=1024)
def _grid(shape: tuple[int, ...], first: int, least: int) -> tuple[slice, ...]:
    """The grid's slices: about the same odd stride along all axes from `first` on.

    Rows are left out rather than columns.
    """
    spare = math.prod(shape[first:]) / least
    grid: list[slice] = []
    for axis in range(len(shape) - 1, first - 1, -1):
        most = int(min(spare ** (1 / (axis - first + 1)), shape[axis] / 2))
        stride = max(1, most - (most % 2 == 0))
        grid.insert(0, slice((shape[axis] - 1) % stride // 2, None, stride))
        spare /= stride
    return (slice(None),) * first + tuple(grid)

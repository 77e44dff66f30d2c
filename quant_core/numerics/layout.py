"""How a weight becomes a matrix: one row per output channel, columns in the order in which the
kernel adds them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Layout:
    """How a weight becomes a matrix (C, K): split its first axis into `groups`, transpose it by
    `perm`, then the first `channel_dims` axes make the rows.

    Conv (O, I/g, kh, kw) -> (O, kh * kw * I/g); Gemm, MatMul (K, N) -> (N, K); a stack of matrices
    (E, K, N) -> (E * N, K); recurrent (D, G, K) -> (D * G, K); ConvTranspose (I, O/g, kh, kw) ->
    (g, I/g, O/g, kh, kw) -> (O, I/g * kh * kw).
    """

    perm: tuple[int, ...]
    channel_dims: int = 1
    groups: int = 1

    @property
    def inverse(self) -> tuple[int, ...]:
        """The permutation that undoes `perm`."""
        return tuple(int(i) for i in np.argsort(self.perm))

    @property
    def is_straight(self) -> bool:
        """Whether nothing is transposed."""
        return self.perm == tuple(range(len(self.perm)))

    @property
    def channel_axis(self) -> int:
        """The axis of the weight along which each slice makes one output channel (of one
        direction).
        """
        return self.perm[self.channel_dims - 1]

    def matrix(self, weight: NDArray[Any]) -> NDArray[Any]:
        """The weight as a contiguous matrix (C, K)."""
        transposed = np.ascontiguousarray(
            weight.reshape(self.split(weight.shape)).transpose(self.perm)
        )
        return transposed.reshape(math.prod(transposed.shape[: self.channel_dims]), -1)

    def tensor(self, rows: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
        """The inverse of `matrix`, for a weight of that shape, with its first axis still split: a
        view, so that models share what it is of.
        """
        return rows.reshape(self.transposed_shape(shape)).transpose(self.inverse)

    def split(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a weight whose first axis is split into groups; the same without groups."""
        if self.groups == 1:
            return shape
        return (self.groups, shape[0] // self.groups, *shape[1:])

    def transposed_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a weight after the split and the transposition by `perm`."""
        split = self.split(shape)
        return tuple(split[i] for i in self.perm)

    def has_one_channel_axis(self, shape: tuple[int, ...]) -> bool:
        """Whether one axis of a weight of that shape tells its channels apart."""
        return math.prod(self.transposed_shape(shape)[: self.channel_dims - 1]) == 1

    def columns(self, shape: tuple[int, ...]) -> int:
        """K: how many weights one output channel has."""
        return math.prod(self.transposed_shape(shape)[self.channel_dims :])

    def beside(self, per_row: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
        """One number per row, in a shape that broadcasts against the weight whose first axis is
        split; a scalar stays as it is.
        """
        if per_row.ndim == 0:
            return per_row
        transposed = self.transposed_shape(shape)
        ones = (1,) * (len(transposed) - self.channel_dims)
        kept = (*transposed[: self.channel_dims], *ones)
        return np.ascontiguousarray(per_row.reshape(kept).transpose(self.inverse))

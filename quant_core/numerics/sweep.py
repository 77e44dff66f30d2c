"""All columns of a weight rounded from left to right, each making up for the errors before it.

With H = R R' for an upper R and e_i = w_i - q_i the error of column i, column j is rounded from its
target w_j + sum over i < j of e_i R_ij / R_jj.

Source: Frantar et al. 2022, GPTQ (arXiv 2210.17323), algorithm 1, computed as Babai's nearest
plane, which it equals (Chen et al. 2025, arXiv 2507.18553).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quant_core.numerics.output_noise import damped, damping_of

STRIPE = 64  # columns after which the rest of the matrix is updated at once: speed only
STEP = 8  # columns after which the rest of their stripe is updated at once: the same
BLOCK = 64  # columns of a factor that are found at once: the same


@dataclass(frozen=True, slots=True, eq=False)
class Factor:
    """The factor R of damped Gram matrices H + damping I = R R', each with R upper triangular.

    ratios   R_ij / R_jj, (G, P, k, k)
    squares  R_jj^2, (G, P, k)
    damping  (G, P)
    """

    ratios: NDArray[np.float32]
    squares: NDArray[np.float32]
    damping: NDArray[np.float64]

    @classmethod
    def of(cls, gram: NDArray[Any], times: float = 1.0) -> Factor:
        damping = damping_of(gram, times)
        matrices = damped(gram, damping).reshape(-1, *gram.shape[2:])
        diagonal = np.arange(matrices.shape[1])
        try:  # a lower factor of the columns in reverse order is an upper one
            upper: NDArray[Any] = lower_factor(matrices[:, ::-1, ::-1])[:, ::-1, ::-1]
        except np.linalg.LinAlgError:  # fewer samples than columns, all nearly equal
            return cls.of(gram, 10 * times)
        own = upper[:, None, diagonal, diagonal]
        ratios = np.asarray((upper / own).reshape(gram.shape), np.float32)
        return cls(ratios, np.square(own).reshape(gram.shape[:3]), damping)

    @property
    def groups(self) -> int:
        return len(self.ratios)


@dataclass(frozen=True, slots=True, eq=False)
class Swept:
    """What a sweep made of rows: their integers (C, K), and what their errors d = w - q make.

    damped_noise  d' (H + damping I) d summed over parts, (C,): what was left of the target of each
                  column, squared, times R_jj^2
    squares       d' d in each part, (C, P)
    damping       of each row and part, (C, P)
    groups        G
    """

    integers: NDArray[np.float32]
    damped_noise: NDArray[np.float64]
    squares: NDArray[np.float64]
    damping: NDArray[np.float64]
    groups: int

    def noise(self, damping: NDArray[np.float64]) -> NDArray[np.float64]:
        """(C,): what `output_noise` is by H with this damping (G, P)."""
        wanted = damping.repeat(len(self.damping) // len(damping), axis=0)
        return np.asarray(self.damped_noise + ((wanted - self.damping) * self.squares).sum(1))

    def split(self, count: int) -> list[Swept]:
        """The results for each of S = `count` scales, of a sweep over `repeated_for` rows."""
        integers, noise, squares, damping = (
            by_scale(x, count, self.groups)
            for x in (self.integers, self.damped_noise, self.squares, self.damping)
        )
        return [
            Swept(integers[i], noise[i], squares[i], damping[i], self.groups) for i in range(count)
        ]


def lower_factor(matrices: NDArray[np.float32]) -> NDArray[np.float32]:
    """L of each matrix (n, k, k) = L L', lower triangular.

    Block by block of columns, nearly all of it products of matrices in float32: numpy's own takes
    four times as long, in double.

    Raises: LinAlgError if a matrix is not positive definite.
    """
    found = np.zeros(matrices.shape, np.float32)
    for first in range(0, matrices.shape[1], BLOCK):
        last = first + BLOCK
        before = found[:, first:last, :first].swapaxes(1, 2)
        left = matrices[:, first:, first:last] - found[:, first:, :first] @ before
        own = np.linalg.cholesky(left[:, :BLOCK])
        found[:, first:last, first:last] = own
        found[:, last:, first:last] = left[:, BLOCK:] @ np.linalg.inv(own).swapaxes(1, 2)
    return found


def repeated_for(
    rows: NDArray[np.float32], scales: NDArray[np.float32], groups: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Every row (C, K) repeated for each of its S scales (S, C): rows (S C, K) and scales (S C,).

    The groups stay together. One sweep over all saves calls of numpy, which take longer than the
    arithmetic on small weights.
    """
    shape = (groups, len(scales), len(rows) // groups, rows.shape[1])
    repeated = np.broadcast_to(rows.reshape(groups, 1, *shape[2:]), shape).reshape(-1, shape[3])
    return repeated, scales.reshape(len(scales), groups, -1).transpose(1, 0, 2).reshape(-1)


def by_scale(x: NDArray[Any], count: int, groups: int) -> NDArray[Any]:
    """What was computed for `repeated_for` rows, (S C, ...), as (S, C, ...)."""
    apart = x.reshape(groups, count, -1, *x.shape[1:])
    return apart.swapaxes(0, 1).reshape(count, -1, *x.shape[1:])


def sweep(
    rows: NDArray[np.float32],
    factor: Factor,
    at: Callable[..., tuple[Any, Any]],
    start: Callable[[int, NDArray[Any]], None] | None = None,
    block: int = 1,
) -> Swept:
    """The integers of all columns, from left to right, and their noise.

    at     (j, column, left) -> the column's integers and their values; `left` is the even neighbour
           of an odd column
    start  (j, targets) is called before the first column j of a block, with what its columns would
           become unrounded
    """
    parts = factor.ratios.shape[1]
    found = [_sweep_part(rows, factor, p, at, start, block) for p in range(parts)]
    integers, noises, squares = zip(*found, strict=True)
    return Swept(
        np.concatenate(integers, axis=1),
        np.sum(noises, axis=0),
        np.stack(squares, axis=1),
        factor.damping.repeat(len(rows) // factor.groups, axis=0),
        factor.groups,
    )


def _sweep_part(
    rows: NDArray[np.float32], factors: Factor, p: int, at: Any, start: Any, block: int
) -> tuple[NDArray[np.float32], NDArray[np.float64], NDArray[np.float64]]:
    """The integers of part p, their noise by the damped H, and their squared errors.

    Its width is even, so that no pair is cut.
    """
    factor = factors.ratios[:, p]
    groups, columns, _ = factor.shape
    offset = p * columns
    stripe, step = (block * max(1, width // block) for width in (STRIPE, STEP))
    exact = rows[:, offset : offset + columns].astype(np.float32).reshape(groups, -1, columns)
    targets = exact.copy()
    out = np.empty((columns, len(rows)), np.float32)
    noise, squares = np.zeros(len(rows)), np.zeros(len(rows))
    for first in range(0, columns, stripe):
        last = min(first + stripe, columns)
        target, w = (
            np.ascontiguousarray(x[:, :, first:last].transpose(2, 0, 1)) for x in (targets, exact)
        )
        e = np.empty_like(target)  # a column of any of the three is contiguous
        within = factor[:, first:last, first:last]
        ahead = np.ascontiguousarray(within.transpose(1, 2, 0))[:, :, :, None]
        for j in range(first, last):
            i = j - first
            if start is not None and j % block == 0:
                now = slice(i, i + block)
                inverse = np.linalg.inv(factor[:, j : j + block, j : j + block])
                shift = np.einsum("bgr,gbc->cgr", target[now] - w[now], inverse)
                start(offset + j, (w[now] + shift).reshape(-1, len(rows)).T)
            column = target[i]
            steps, values = at(offset + j, column.reshape(-1), out[j - 1] if j % 2 else None)
            out[j] = steps
            rounded = values.reshape(column.shape)
            np.subtract(w[i], rounded, out=e[i])
            end = min(i - i % step + step, last - first)
            target[i + 1 : end] += ahead[i, i + 1 : end] * e[i]
            column -= rounded  # what is left of its target
            if i + 1 == end < last - first:
                done = slice(i - i % step, end)
                passed_on = within[:, done, end:].transpose(0, 2, 1)
                target[end:] += (passed_on @ e[done].transpose(1, 0, 2)).transpose(1, 0, 2)
        if last < columns:
            targets[:, :, last:] += e.transpose(1, 2, 0) @ factor[:, first:last, last:]
        of_columns = factors.squares[:, p, first:last].T[:, :, None]
        noise += (np.square(target) * of_columns).sum(0, dtype=np.float64).reshape(-1)
        squares += np.square(e).sum(0, dtype=np.float64).reshape(-1)
    return np.ascontiguousarray(out.T), noise, squares

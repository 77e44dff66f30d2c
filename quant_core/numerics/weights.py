"""Which integers stand for a weight: one row per output channel, columns in the order in which the kernel adds them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quant_core.model import graph
from quant_core.numerics.saturation import make_safe, safe_scale

Matrix = NDArray[np.float32]
QMAX8, QMAX4, MULTIPLIER_MAX = 127, 7, 15
BLOCK_MIN = 8
CHUNK = 1 << 20  # weights worked on at a time, so that temporaries stay small


@dataclass(frozen=True, slots=True)
class Layout:
    """How a weight becomes a matrix (C, K): transpose by `perm`, then the first `channel_dims` axes make the rows.

    Conv (O, I/g, kh, kw) -> (O, kh * kw * I/g); Gemm, MatMul (K, N) -> (N, K); recurrent (D, G, K) -> (D * G, K).
    """

    perm: tuple[int, ...]
    channel_dims: int = 1

    def matrix(self, weight: NDArray[Any]) -> NDArray[Any]:
        moved = weight.transpose(self.perm)
        return np.ascontiguousarray(moved).reshape(
            int(np.prod(moved.shape[: self.channel_dims])), -1
        )

    def tensor(self, rows: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
        """The inverse of `matrix`, for a weight of that shape: a view, so that models share what it is of."""
        return rows.reshape(self.moved_shape(shape)).transpose(self.inverse)

    def moved_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(shape[i] for i in self.perm)

    @property
    def inverse(self) -> tuple[int, ...]:
        return tuple(int(i) for i in np.argsort(self.perm))

    def beside(self, per_row: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
        """One number per row, in a shape that broadcasts against the weight; one number as it is."""
        if per_row.ndim == 0:
            return per_row
        moved = self.moved_shape(shape)
        kept = tuple(n if i < self.channel_dims else 1 for i, n in enumerate(moved))
        return np.ascontiguousarray(per_row.reshape(kept).transpose(self.inverse))


def layout_of(node: ir.Node, rank: int) -> Layout:
    """The layout of a weight of that rank of the node."""
    match node.op_type:
        case "Conv" | "QLinearConv" | "ConvInteger":
            return Layout((0, *range(2, rank), 1))
        case "ConvTranspose":
            return Layout((1, 0, *range(2, rank)))
        case "LSTM" | "GRU" | "RNN":
            return Layout((0, 1, 2), channel_dims=2)
        case "Gather":
            return Layout((0, 1))
        case "DynamicQuantizeLSTM":  # (D, K, 4H)
            return Layout((0, 2, 1), channel_dims=2)
        case "Gemm" | "QGemm" if graph.attribute(node, "transB", 0):
            return Layout((0, 1))
        case _:  # MatMul (..., K, N), Gemm (K, N)
            return Layout((rank - 1, *range(rank - 1)))


@dataclass(frozen=True, slots=True, eq=False)
class IntegerWeight:
    """int8 rows (C, K) and one scale per row (C,), or () for the whole weight.

    Stored in four bits, q = blocks * multipliers: int8 holding -7..7 (C, K) and uint8 1..15 (C, K / block).
    """

    q: NDArray[np.int8]
    scale: NDArray[np.float32]
    blocks: NDArray[np.int8] | None = None
    multipliers: NDArray[np.uint8] | None = None

    @property
    def values(self) -> Matrix:
        """The numbers that the integers stand for, (C, K)."""
        scale = self.scale[:, None] if self.scale.ndim else self.scale
        return self.q.astype(np.float32) * scale


def quantize_int8(
    rows: Matrix,
    *,
    per_channel: bool = True,
    safe: bool = False,
    method: str = "auto",
    floor: NDArray[Any] | float = 0.0,
) -> IntegerWeight:
    """int8 rows in -127..127.

    rtn        scale = max|w| / 127, the nearest integers
    mse, auto  the scale with the least squared error among a few around it
    safe       no pair of neighbours can saturate int16 (saturation.py); then the least error is sought between the
               finest scale, whose unsafe pairs are pulled in, and the scale at which all pairs are safe by themselves
    floor      scales are at least this (a bias must fit into int32)
    """
    finest = np.abs(rows).max(1, initial=0.0).astype(np.float64) / QMAX8
    widest = np.maximum(finest, safe_scale(rows)) if safe else finest
    if not per_channel:
        finest, widest = np.full_like(finest, finest.max()), np.full_like(widest, widest.max())
    if method == "rtn":
        candidates = [widest]
    elif safe:
        candidates = [
            finest * (widest / np.maximum(finest, 1e-300)) ** t for t in (1.0, 0.75, 0.5, 0.25, 0.0)
        ]
    else:
        candidates = [finest * t for t in (1.0, 0.97, 0.93, 0.88, 0.82)]
    floors = np.broadcast_to(np.asarray(floor, np.float64), finest.shape)

    def attempt(part: slice, candidate: int) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
        scale = np.maximum(
            candidates[candidate][part], floors[part] if per_channel else floors.max()
        )
        scale32 = _usable(scale)
        q = np.clip(np.rint(rows[part] / scale32[:, None]), -QMAX8, QMAX8).astype(np.int8)
        return (make_safe(q) if safe else q), scale32

    q, scale = _least_error(rows, attempt, len(candidates), per_channel)
    return IntegerWeight(q, scale if per_channel else scale[0])


def _least_error(
    rows: Matrix,
    attempt: Callable[[slice, int], tuple[NDArray[np.int8], NDArray[np.float32]]],
    n: int,
    per_row: bool,
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """The integers and scales of the attempt with the least squared error, row by row or for all rows at once."""
    parts = list(_row_parts(rows))

    def error(part: slice, k: int) -> NDArray[np.float64]:
        q, scale = attempt(part, k)
        difference = rows[part] - q.astype(np.float32) * scale[:, None]
        return np.asarray(np.einsum("ck,ck->c", difference, difference, dtype=np.float64))

    errors = (
        np.array([np.concatenate([error(part, k) for part in parts]) for k in range(n)])
        if n > 1
        else None
    )
    if errors is None:
        best = np.zeros(len(rows), int)
    else:
        best = errors.argmin(0) if per_row else np.full(len(rows), errors.sum(1).argmin())
    q, scale = np.empty(rows.shape, np.int8), np.empty(len(rows), np.float32)
    for part in parts:
        for k in np.unique(best[part]):
            found_q, found_scale = attempt(part, int(k))
            mine = best[part] == k
            q[part][mine], scale[part][mine] = found_q[mine], found_scale[mine]
    return q, scale


def block_width(columns: int, wanted: int) -> int:
    """The divisor of `columns` nearest to the wanted block (by ratio), so that no block is cut.

    Not below BLOCK_MIN (a multiplier takes as much room as a weight): a prime number of columns is one block.
    """
    least = min(columns, BLOCK_MIN)
    divisors = [d for d in range(least, columns + 1) if columns % d == 0]
    return min(divisors, key=lambda d: (abs(np.log2(d / wanted)), -d))


def quantize_int4(
    rows: Matrix, block: int, *, safe: bool = False, floor: NDArray[Any] | float = 0.0
) -> IntegerWeight:
    """int4 in blocks of `block` columns (which divide K): w ~ scale[c] * multiplier[c, block] * int4.

    The channel's scale lets the block with the largest weight use multiplier 15; each block takes the multiplier with
    the least squared error. All products are within +-105, so they are int8 on the channel's own grid. Scales are
    bfloat16 numbers, which take half the room.
    """
    channels, columns = rows.shape
    finest = np.abs(rows).max(1, initial=0.0).astype(np.float64) / (QMAX4 * MULTIPLIER_MAX)
    scale = bfloat16(_usable(np.maximum(finest, floor)))
    blocks = np.empty(rows.shape, np.int8)
    multipliers = np.empty((channels, columns // block), np.uint8)
    for part in _row_parts(rows):
        grouped = (rows[part] / scale[part][:, None]).reshape(-1, columns // block, block)
        peak = np.abs(grouped).max(2)
        least = np.full(peak.shape, np.inf, np.float32)
        best = np.ones(peak.shape, np.uint8)
        for m in range(1, MULTIPLIER_MAX + 1):
            q = np.clip(np.rint(grouped / np.float32(m)), -QMAX4, QMAX4)
            difference = grouped - q * np.float32(m)
            error = np.einsum("cbk,cbk->cb", difference, difference)
            better = error < least
            least, best = np.where(better, error, least), np.where(better, np.uint8(m), best)
        q = np.clip(np.rint(grouped / best[..., None].astype(np.float32)), -QMAX4, QMAX4).astype(
            np.int8
        )
        blocks[part] = q.reshape(q.shape[0], columns)
        multipliers[part] = best
    if safe:
        blocks = _safe_blocks(blocks, multipliers, block)
    product = (blocks.astype(np.int16) * np.repeat(multipliers, block, axis=1)).astype(np.int8)
    return IntegerWeight(product, scale, blocks, multipliers)


def bfloat16(scale: NDArray[np.float32]) -> NDArray[np.float32]:
    """The next bfloat16 number that is no smaller."""
    return np.asarray(
        (scale.view(np.uint32) + np.uint32(0xFFFF) & np.uint32(0xFFFF0000)).view(np.float32)
    )


def _safe_blocks(
    blocks: NDArray[np.int8], multipliers: NDArray[np.uint8], block: int
) -> NDArray[np.int8]:
    """The larger of two neighbours gives up one step, until every pair of products is safe."""
    spread = np.repeat(multipliers, block, axis=1).astype(np.int16)
    blocks = blocks.copy()
    while True:
        product = (blocks * spread).astype(np.int16)
        safe = make_safe(product.astype(np.int8))
        moved = np.abs(safe.astype(np.int16)) < np.abs(product)
        if not moved.any():
            return blocks
        left = np.zeros_like(moved)
        left[:, : moved.shape[1] // 2 * 2] = _larger_of_pair(np.abs(product), moved)
        blocks = (blocks - np.where(left, np.sign(blocks), 0)).astype(np.int8)


def _larger_of_pair(magnitude: NDArray[np.int16], moved: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Of each pair in which something must move, the position of the larger one: (C, K without an odd last)."""
    even = magnitude.shape[1] // 2 * 2
    pairs = magnitude[:, :even].reshape(len(magnitude), -1, 2)
    needed = moved[:, :even].reshape(pairs.shape).any(2)
    first = pairs[..., 0] >= pairs[..., 1]
    return np.stack([needed & first, needed & ~first], axis=2).reshape(len(magnitude), even)


def _row_parts(rows: Matrix) -> Iterator[slice]:
    """Slices of rows with about CHUNK weights each."""
    step = max(1, CHUNK // max(rows.shape[1], 1))
    return (slice(i, min(i + step, len(rows))) for i in range(0, len(rows), step))


def _usable(scale: NDArray[np.float64]) -> NDArray[np.float32]:
    """float32, 1 for a row of zeros, never subnormal."""
    tiny = float(np.finfo(np.float32).tiny)
    return np.where(scale > 0, np.maximum(scale, tiny), 1.0).astype(np.float32)

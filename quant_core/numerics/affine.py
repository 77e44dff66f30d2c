"""How real numbers map to integers and back: real = (integer - zero_point) * scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import ArrayLike, NDArray

from quant_core.errors import DataError, ModelError

Floats = NDArray[np.float32]
# Of a grid's dtype: int4 and uint4 are those of ml_dtypes, unknown to numpy's types.
Integers = NDArray[Any]

_DTYPES: dict[tuple[int, bool], np.dtype[Any]] = {
    (4, True): np.dtype(ml_dtypes.int4),
    (4, False): np.dtype(ml_dtypes.uint4),
    (8, True): np.dtype(np.int8),
    (8, False): np.dtype(np.uint8),
    (16, True): np.dtype(np.int16),
    (16, False): np.dtype(np.uint16),
    (32, True): np.dtype(np.int32),  # biases
}
_FLOAT_MAX = float(np.finfo(np.float32).max)
_FLOAT_TINY = np.finfo(np.float32).tiny  # a subnormal scale is flushed to zero by some kernels


@dataclass(frozen=True, slots=True)
class Grid:
    """The integers a tensor may take.

    symmetric: zero in the middle and as many steps on both sides, so -127..127 in int8, -7..7 in
    int4, 1..255 around 128 in uint8. Otherwise all integers of the type, and zero wherever the
    range needs it.
    """

    bits: int
    signed: bool
    symmetric: bool

    def __post_init__(self) -> None:
        if (self.bits, self.signed) not in _DTYPES:
            known = ", ".join(f"{'' if signed else 'u'}int{bits}" for bits, signed in _DTYPES)
            raise ModelError(
                f"no grid of {self.bits} bits, signed={self.signed}", hint=f"One of {known}"
            )

    @property
    def dtype(self) -> np.dtype[Any]:
        """numpy's or ml_dtypes' type of one integer."""
        return _DTYPES[self.bits, self.signed]

    @property
    def qmin(self) -> int:
        return (-(1 << self.bits - 1) if self.signed else 0) + self.symmetric

    @property
    def qmax(self) -> int:
        return (1 << self.bits - 1) - 1 if self.signed else (1 << self.bits) - 1

    @property
    def middle(self) -> int:
        """The zero point of a symmetric grid."""
        return 0 if self.signed else 1 << self.bits - 1


@dataclass(frozen=True, slots=True, eq=False)
class QuantParams:
    """How one tensor maps to its grid, as ONNX's QuantizeLinear and DequantizeLinear read it (opset
    21).

    per tensor   scale and zero_point are (), axis and block None
    per channel  (C,), for C slices along `axis`
    in blocks    the tensor's shape with ceil(size / block) instead of `size` at `axis`
    """

    scale: Floats
    zero_point: Integers
    axis: int | None
    grid: Grid
    block: int | None = None

    def __post_init__(self) -> None:
        if self.scale.dtype != np.float32 or self.zero_point.dtype != self.grid.dtype:
            types = f"{self.scale.dtype} and {self.zero_point.dtype}"
            raise ModelError(
                f"scale and zero point are {types}",
                hint=f"They must be float32 and {self.grid.dtype}",
            )
        if self.scale.shape != self.zero_point.shape:
            raise ModelError(
                f"scale {self.scale.shape} and zero point {self.zero_point.shape} differ in shape"
            )
        if (self.scale.ndim == 0) != (self.axis is None) or (
            self.block is None and self.scale.ndim > 1
        ):
            raise ModelError(
                f"a scale of shape {self.scale.shape} with axis {self.axis} and block {self.block}"
            )
        if not np.all((self.scale > 0) & np.isfinite(self.scale)):
            raise ModelError(
                "a scale is zero, negative or not finite", hint="Is there NaN or inf in a weight?"
            )


def choose_params(
    lo: ArrayLike, hi: ArrayLike, grid: Grid, axis: int | None = None, block: int | None = None
) -> QuantParams:
    """The finest scale that covers [lo, hi] and zero, which is always exactly representable.

    `lo` and `hi` have the shape that the scale will have. An empty range ([0, 0]) gets scale 1, so
    zeros stay zeros. A value in the range comes back within scale / 2 (and some millionths of a
    step, because of float32).
    Raises: DataError if a bound is not finite or lo > hi.
    """
    lows, highs = np.asarray(lo, np.float64), np.asarray(hi, np.float64)
    if not np.all(np.isfinite(lows) & np.isfinite(highs) & (lows <= highs)):
        raise DataError(
            f"no range from {lows} to {highs}", hint="Both ends must be finite, the lower one first"
        )
    lows, highs = np.minimum(lows, 0.0), np.maximum(highs, 0.0)
    if grid.symmetric:
        scale = _usable_scale(np.maximum(-lows, highs) / (grid.qmax - grid.middle))
        zero = np.full(scale.shape, float(grid.middle))
    else:
        scale = _usable_scale((highs - lows) / (grid.qmax - grid.qmin))
        zero = np.clip(np.rint(grid.qmin - lows / scale), grid.qmin, grid.qmax)
    reach = np.maximum(zero - grid.qmin, grid.qmax - zero)
    scale = np.minimum(
        scale, _toward_zero(_FLOAT_MAX / reach)
    )  # the outermost integer must not become inf
    return QuantParams(scale, zero.astype(np.int64).astype(grid.dtype), axis, grid, block)


def range_of(
    x: NDArray[Any], axis: int | None, block: int | None = None
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Minimum and maximum of the whole of `x`, of its slices along `axis`, or of its blocks: for
    `choose_params`.
    """
    if axis is None:
        return x.min(), x.max()
    if block is not None:
        starts = np.arange(0, x.shape[axis], block)
        return np.minimum.reduceat(x, starts, axis), np.maximum.reduceat(x, starts, axis)
    others = tuple(i for i in range(x.ndim) if i != axis % x.ndim)
    return x.min(axis=others), x.max(axis=others)


def quantize(x: NDArray[Any], params: QuantParams) -> Integers:
    """The nearest integers of the grid, halves to even, the rest clipped: ONNX's QuantizeLinear.
    `x` has no NaN.

    A symmetric grid clips one integer earlier than QuantizeLinear does (-127, not -128).
    """
    grid = params.grid
    exact = np.float64 if grid.bits > 16 else np.float32  # onnxruntime divides in float32
    zero = _spread(params.zero_point.astype(exact), params, x.shape)
    with np.errstate(over="ignore"):
        steps = np.rint(x.astype(exact) / _spread(params.scale, params, x.shape))
    steps += zero
    return np.asarray(np.clip(steps, grid.qmin, grid.qmax).astype(np.int32).astype(grid.dtype))


def dequantize(q: Integers, params: QuantParams) -> Floats:
    """The float32 numbers that the integers stand for: ONNX's DequantizeLinear."""
    steps = q.astype(np.int32) - _spread(params.zero_point.astype(np.int32), params, q.shape)
    return np.asarray(steps.astype(np.float32) * _spread(params.scale, params, q.shape), np.float32)


def _usable_scale(scale: NDArray[np.float64]) -> Floats:
    return np.where(scale > 0, np.maximum(_toward_zero(scale), _FLOAT_TINY), np.float32(1)).astype(
        np.float32
    )


def _toward_zero(x: NDArray[np.float64]) -> Floats:
    # not to the nearest: a range that sticks out of Clip(0, 6) by one ulp keeps onnxruntime from
    # fusing the Clip
    nearest = np.asarray(np.minimum(x, _FLOAT_MAX), np.float32)
    return np.where(nearest > x, np.nextafter(nearest, np.float32(0)), nearest)


def _spread(value: NDArray[Any], params: QuantParams, shape: tuple[int, ...]) -> NDArray[Any]:
    """`value`, one per tensor, channel or block, made to broadcast against a tensor of `shape`."""
    if params.axis is None:
        return value
    axis = params.axis % len(shape)
    if params.block is not None:
        return np.repeat(value, params.block, axis).take(np.arange(shape[axis]), axis)
    return value.reshape([-1 if i == axis else 1 for i in range(len(shape))])

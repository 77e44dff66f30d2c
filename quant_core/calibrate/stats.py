"""Statistics of a tensor that merge exactly: histograms and channel means of any number of samples.

They are the same to the last bit, however the samples were split over workers, batched or ordered.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from quant_core.errors import DataError

Counts = NDArray[np.int64]

MAX_BINS = 8192  # of one histogram: 32 for each level of an 8-bit grid, in 64 KiB; not tuned
_CHUNK = 1 << 15  # values at a time: the temporaries stay in the cache
_INDEX_BITS = 23  # bin numbers below 2**23 in size are exact in float32
_FINEST = -126  # 2**126 is the largest power of two that is safe to multiply by

_QUANTUM = 20  # a value counts as a multiple of 2**-20 in a sum
_LIMB = 28  # bits of the lower limb of a sum
_LARGEST = 2.0**36  # beyond it a value counts as this in a sum, so that two limbs always hold it


@dataclass(slots=True, eq=False)
class TensorStats:
    """Exact minimum and maximum, and a histogram, of the values of one tensor.

    Bin i holds the values in [(first + i) * width, (first + i + 1) * width). The width is the
    smallest power of two that needs at most MAX_BINS bins from `lo` to `hi`, hence a function of
    the values alone. More than MAX_BINS / 2 bins are used, unless the values are nearly equal. A
    wider range folds neighbouring bins exactly.

    `update` changes the statistic, `merge` makes a new one; the empty one is its identity.
    """

    lo: float = math.inf
    hi: float = -math.inf
    counts: Counts = field(default_factory=lambda: np.zeros(0, np.int64))

    def update(
        self, x: NDArray[Any], where: str = "", bounds: tuple[float, float] | None = None
    ) -> None:
        """Adds all values of `x`, of any shape.

        where   the tensor's name, for errors
        bounds  the least and the largest value of the tensor, where `x` are only those of its
                values that the histogram counts, as all would cost too much (see `thinned`)

        Raises: DataError if a value is NaN or infinite; nothing is added then.
        """
        values = np.ascontiguousarray(x, np.float32).ravel()
        if not values.size:
            return
        lo, hi = bounds or (float(values.min()), float(values.max()))
        if not math.isfinite(hi - lo):
            raise _not_finite(values, where)
        self._widen(lo, hi)
        exponent = self.exponent
        first = math.floor(math.ldexp(self.lo, -exponent))
        # float64 for wide bins: in float32 a tiny negative value would underflow to -0.0 and change
        # bins
        exact = np.float32 if exponent <= 0 else np.float64
        scale = exact(2.0**-exponent)
        for start in range(0, values.size, _CHUNK):
            bins = np.multiply(values[start : start + _CHUNK], scale, dtype=exact)
            np.floor(bins, out=bins)
            bins -= first
            added = np.bincount(bins.astype(np.int32))
            self.counts[: added.size] += added

    def merge(self, other: TensorStats) -> TensorStats:
        """The statistic of the values of both, a new one."""
        both = TensorStats(self.lo, self.hi, self.counts.copy())
        if other.counts.size:
            both._widen(other.lo, other.hi)
            _add_folded(both.counts, both.exponent, both.first, other)
        return both

    @property
    def count(self) -> int:
        return int(self.counts.sum())

    @property
    def exponent(self) -> int:
        """A bin is 2 ** exponent wide."""
        return _exponent(self.lo, self.hi)

    @property
    def width(self) -> float:
        return 2.0**self.exponent

    @property
    def first(self) -> int:
        """The number of the first bin, which holds `lo`: its left edge in widths."""
        return math.floor(math.ldexp(self.lo, -self.exponent))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TensorStats):
            return NotImplemented
        return (self.lo, self.hi) == (other.lo, other.hi) and np.array_equal(
            self.counts, other.counts
        )

    def pack(self) -> tuple[NDArray[np.float64], Counts]:
        """Everything in two arrays; `unpack` gives the statistic back."""
        return np.array([self.lo, self.hi]), self.counts

    @classmethod
    def unpack(cls, floats: NDArray[np.float64], integers: Counts) -> Self:
        return cls(float(floats[0]), float(floats[1]), integers)

    def _widen(self, lo: float, hi: float) -> None:
        # + 0.0 makes -0.0 to 0.0: which of the two `min` takes depends on their order
        lo = min(self.lo, lo) + 0.0
        hi = max(self.hi, hi) + 0.0
        if (lo, hi) == (self.lo, self.hi):
            return
        old = TensorStats(self.lo, self.hi, self.counts)
        self.lo, self.hi = lo, hi
        exponent, first = self.exponent, self.first
        self.counts = np.zeros(_bins(lo, hi, exponent), np.int64)
        if old.counts.size:
            _add_folded(self.counts, exponent, first, old)


@dataclass(slots=True, eq=False)
class ChannelMoments:
    """Exact mean and largest magnitude of every slice along `axis`.

    Sums are integers (each value counts as a multiple of 2**-20) in two limbs, high * 2**28 + low
    with 0 <= low < 2**28, so no order of adding changes them. `update` changes the statistic,
    `merge` makes a new one; one without channels is the identity.
    """

    axis: int
    count: int = 0  # values per channel
    max_abs: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    high: Counts = field(default_factory=lambda: np.zeros(0, np.int64))
    low: Counts = field(default_factory=lambda: np.zeros(0, np.int64))

    def update(self, x: NDArray[Any], where: str = "") -> None:
        """Adds a tensor; `where` is its name, for errors.

        Raises: DataError if it has another number of channels, or values that are not finite.
        """
        if not x.size:
            return
        rows = np.ascontiguousarray(np.moveaxis(x, self.axis, -1), np.float32).reshape(
            -1, x.shape[self.axis]
        )
        channels = rows.shape[1]
        max_abs = np.zeros(channels)
        high = np.zeros(channels, np.int64)
        low = np.zeros(channels, np.int64)
        step = max(1, _CHUNK // channels)
        for start in range(0, len(rows), step):
            block = rows[start : start + step]
            peak = np.abs(block).max(0)
            largest = float(peak.max())
            if not math.isfinite(largest):
                raise _not_finite(rows, where)
            upper, lower = _exact_sums(block, largest)
            max_abs = np.maximum(max_abs, peak)
            high, low = _carry(high + upper, low + lower)
        self._add(ChannelMoments(self.axis, len(rows), max_abs, high, low), where)

    def merge(self, other: ChannelMoments) -> ChannelMoments:
        """The statistic of the values of both."""
        both = ChannelMoments(self.axis, self.count, self.max_abs, self.high, self.low)
        both._add(other, "")
        return both

    @property
    def mean(self) -> NDArray[np.float64]:
        """(C,), within 2**-21 of the true mean; empty if nothing was seen."""
        return (self.high * 2.0**_LIMB + self.low) * 2.0**-_QUANTUM / max(self.count, 1)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ChannelMoments):
            return NotImplemented
        mine, theirs = self.pack(), other.pack()
        return all(np.array_equal(a, b) for a, b in zip(mine, theirs, strict=True))

    def pack(self) -> tuple[NDArray[np.float64], Counts]:
        """Everything in two arrays; `unpack` gives the statistic back."""
        return self.max_abs, np.concatenate([[self.axis, self.count], self.high, self.low]).astype(
            np.int64
        )

    @classmethod
    def unpack(cls, floats: NDArray[np.float64], integers: Counts) -> Self:
        high, low = integers[2:].reshape(2, -1)
        return cls(int(integers[0]), int(integers[1]), floats, high, low)

    def _add(self, other: ChannelMoments, where: str) -> None:
        if not other.count:
            return
        if not self.count:
            self.max_abs, self.high, self.low = other.max_abs, other.high, other.low
        elif self.max_abs.size != other.max_abs.size:
            sizes = f"{self.max_abs.size} and {other.max_abs.size}"
            problem = f"axis {self.axis} has {sizes} channels"
            raise DataError(problem, where, "Its size must not change between samples")
        else:
            self.max_abs = np.maximum(self.max_abs, other.max_abs)
            self.high, self.low = _carry(self.high + other.high, self.low + other.low)
        self.count += other.count


Statistic = TensorStats | ChannelMoments
K = TypeVar("K")
S = TypeVar("S", TensorStats, ChannelMoments)


def merge_stats(parts: Iterable[Mapping[K, S]]) -> dict[K, S]:
    """The statistics of all parts together, key by key; a key may be missing in some parts."""
    merged: dict[K, S] = {}
    for part in parts:
        for key, stats in part.items():
            merged[key] = merged[key].merge(stats) if key in merged else stats
    return merged


def _exponent(lo: float, hi: float) -> int:
    """The least e such that MAX_BINS bins of 2**e cover [lo, hi], exactly numbered in float32."""
    below = _log2(hi - lo) - MAX_BINS.bit_length()  # too fine for sure
    exponent = max(below, _log2(max(-lo, hi)) - _INDEX_BITS, _FINEST)
    while _bins(lo, hi, exponent) > MAX_BINS:
        exponent += 1
    return exponent


def _log2(x: float) -> int:
    # the exponent of frexp(0) would be larger than that of a tiny number
    return math.frexp(x)[1] if x else 2 * _FINEST


def _bins(lo: float, hi: float, exponent: int) -> int:
    return math.floor(math.ldexp(hi, -exponent)) - math.floor(math.ldexp(lo, -exponent)) + 1


def _add_folded(counts: Counts, exponent: int, first: int, finer: TensorStats) -> None:
    """Adds the histogram of `finer`, whose range lies inside, to `counts`."""
    bins = (finer.first + np.arange(finer.counts.size)) >> (exponent - finer.exponent)
    starts = np.flatnonzero(np.diff(bins, prepend=bins[0] - 1))
    offset = int(bins[0]) - first
    counts[offset : offset + starts.size] += np.add.reduceat(finer.counts, starts)


def _exact_sums(rows: NDArray[np.float32], largest: float) -> tuple[Counts, Counts]:
    """Sums of the columns in two limbs; no addition is rounded, so their order does not matter."""
    # every partial sum is an integer that float64 holds
    if math.ldexp(largest, _QUANTUM) * len(rows) < 2**52:
        steps = np.rint(rows * np.float32(2**_QUANTUM))
        return np.zeros(rows.shape[1], np.int64), steps.sum(0, dtype=np.float64).astype(np.int64)
    steps = np.rint(np.clip(rows.astype(np.float64), -_LARGEST, _LARGEST) * 2**_QUANTUM)
    upper = np.floor(steps * 2.0**-_LIMB)
    lower = steps - upper * 2.0**_LIMB
    return upper.sum(0).astype(np.int64), lower.sum(0).astype(np.int64)


def _carry(high: Counts, low: Counts) -> tuple[Counts, Counts]:
    return high + (low >> _LIMB), low & ((1 << _LIMB) - 1)


def _not_finite(values: NDArray[np.float32], where: str) -> DataError:
    bad = values.size - np.count_nonzero(np.isfinite(values))
    problem = f"{bad} of {values.size} values are NaN or infinite"
    return DataError(problem, where, "Is a sample broken, or does the float model overflow?")

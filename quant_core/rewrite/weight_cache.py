"""Rounded weights, and all that their integers depend on, so that none is rounded twice."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from quant_core.numerics.granularity import Granularity
from quant_core.numerics.integer_weight import IntegerWeight
from quant_core.numerics.layout import Layout
from quant_core.plan.types import Storage


@dataclass(frozen=True, slots=True, eq=False)
class Rounded:
    """A weight as integers, how it lies in its operator, and its signal to rounding noise in dB.

    worst_row_db  the same of the channel that suffers most; of a stack, of all its matrices
    """

    integers: IntegerWeight
    layout: Layout
    shape: tuple[int, ...]
    sqnr_db: float
    worst_row_db: float

    @property
    def bits(self) -> int:
        """Bits of one integer."""
        return 8 if self.integers.blocks is None else 4

    def rows(self, layout: Layout) -> NDArray[np.float32]:
        """The numbers that the integers stand for, as rows (C, K) of this layout."""
        values = self.integers.values
        if layout == self.layout:
            return values
        return layout.matrix(self.layout.tensor(values, self.shape))


class ByIdentity:
    """A key that is equal only if it stands for the same object, which it keeps alive."""

    __slots__ = ("of",)

    def __init__(self, of: object) -> None:
        self.of = of

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ByIdentity) and self.of is other.of

    def __hash__(self) -> int:
        return id(self.of)


@dataclass(frozen=True, slots=True)
class RoundingKey:
    """All that the integers of a weight depend on.

    name, digest  the weight; the digest is of its values, since rewritten models have other values
                  by the same name
    layout        how it becomes rows
    storage, granularity, pair_safe, method  how the plan and its config treat it
    has_short_scales  whether its scales are bfloat16 numbers
    pairs_channels    the target's
    floor         the least scales, as bytes; empty without
    factors       what its columns are multiplied by first, as bytes; empty without
    calibration   the rounding target, or the Gram matrix, that rounding reads; None if it reads
                  neither. A matrix that is computed when it is read is known by those that have it
    node          whose Gram matrix among these; nodes that share a weight share the integers made
                  for the first of them
    """

    name: str
    digest: bytes
    layout: Layout | None
    storage: Storage
    granularity: Granularity
    pair_safe: bool
    method: str
    has_short_scales: bool
    pairs_channels: bool
    floor: bytes = b""
    factors: bytes = b""
    calibration: ByIdentity | None = None
    node: str = ""


@dataclass(slots=True)
class WeightCache:
    """Rounded weights, each made once for all nodes, plans and candidates of one float model that
    share it.

    A cache keeps the calibration alive that its weights were rounded with: new calibration deserves
    a new cache.

    seconds  that rounding them took
    """

    rounded: dict[RoundingKey, Rounded] = field(default_factory=dict)
    seconds: float = 0.0

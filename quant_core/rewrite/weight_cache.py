"""Rounded weights, and all that their integers depend on, so that none is rounded twice."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quant_core.calibrate.gram import ScaledGrams
from quant_core.calibrate.observe import Statistics
from quant_core.model import graph
from quant_core.numerics.granularity import Granularity
from quant_core.numerics.integer_weight import IntegerWeight
from quant_core.numerics.layout import Layout
from quant_core.numerics.weight_methods import WEIGHT_METHODS
from quant_core.plan.targets import TARGETS
from quant_core.plan.types import NodePlan, QuantPlan, Storage


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


class RoundingKeys:
    """The keys of the weights of one plan, which are rounded with these statistics.

    has_short_scales  onnxruntime makes float32 of bfloat16 scales when it loads a model, as it does
                      of 4 bits
    """

    def __init__(self, plan: QuantPlan, stats: Statistics | None) -> None:
        target = TARGETS[plan.target]
        self.stats = stats
        self.method = plan.config.weight_method
        self.has_short_scales = bool(plan.in_four_bits) and target.decodes_int4
        self.pairs_channels = target.pairs_channels
        self._first_node: dict[RoundingKey, str] = {}
        self._digests: dict[ByIdentity, bytes] = {}

    def of_node(
        self,
        node: ir.Node,
        weight: ir.Value,
        planned: NodePlan,
        layout: Layout,
        floor: NDArray[np.float64] | float,
        factors: NDArray[np.float32] | None,
    ) -> RoundingKey:
        """The key of a weight that is rounded by what calibration knows of the node's input."""
        key = replace(
            self.of_weight(weight, planned, layout),
            floor=np.asarray(floor, np.float64).tobytes() if np.any(floor) else b"",
            factors=b"" if factors is None else factors.tobytes(),
        )
        first = self._first_node.setdefault(key, str(node.name))
        calibration = self._calibration(first)
        return key if calibration is None else replace(key, calibration=calibration, node=first)

    def of_weight(self, weight: ir.Value, planned: NodePlan, layout: Layout | None) -> RoundingKey:
        """The key of a weight that is rounded without calibration."""
        tensor = ByIdentity(weight.const_value)
        if tensor not in self._digests:
            array = np.ascontiguousarray(graph.array(weight))
            self._digests[tensor] = hashlib.sha1(array.data, usedforsecurity=False).digest()
        return RoundingKey(
            str(weight.name),
            self._digests[tensor],
            layout,
            planned.weight_storage,
            planned.weight_granularity,
            planned.pair_safe,
            self.method,
            self.has_short_scales,
            self.pairs_channels,
        )

    def _calibration(self, node: str) -> ByIdentity | None:
        """What rounding the node's weight reads of calibration."""
        if self.stats is None:
            return None
        if node in self.stats.rounding_targets:
            return ByIdentity(self.stats.rounding_targets[node])
        grams = self.stats.gram_matrices
        if not WEIGHT_METHODS[self.method].uses_gram or node not in grams:
            return None
        is_made_anew = isinstance(grams, ScaledGrams) and grams.has_changed(node)
        return ByIdentity(grams if is_made_anew else grams[node])


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

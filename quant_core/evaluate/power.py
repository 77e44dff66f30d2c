"""Signal and noise of what each node writes: sums that come out the same however samples were shared out."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

CAP_DB = 200.0  # of a node that changes nothing


@dataclass(frozen=True, slots=True)
class NodeDamage:
    """Signal to noise of what a node writes, in dB: given float's inputs (alone), in the quantized model (so_far)."""

    node: str
    op_type: str
    alone_db: float
    so_far_db: float


@dataclass(frozen=True, slots=True)
class NodePower:
    """Of what a node writes, for each sample the sum of squares of float's values, and of the two differences."""

    node: str
    op_type: str
    signal: tuple[float, ...]
    alone: tuple[float, ...]
    so_far: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def damage_of(parts: Iterable[Iterable[NodePower]]) -> list[NodeDamage]:
    """One row per node that changes anything, in the order of the first part; fsum makes the parts' order no matter."""
    found: dict[str, list[NodePower]] = {}
    for part in parts:
        for power in part:
            found.setdefault(power.node, []).append(power)
    rows = []
    for node, powers in found.items():
        if signal := math.fsum(x for p in powers for x in p.signal):
            alone = math.fsum(x for p in powers for x in p.alone)
            so_far = math.fsum(x for p in powers for x in p.so_far)
            rows.append(
                NodeDamage(node, powers[0].op_type, _db(signal, alone), _db(signal, so_far))
            )
    return [row for row in rows if row.alone_db < CAP_DB]


def _db(signal: float, noise: float) -> float:
    return min(CAP_DB, 10 * math.log10(signal / noise)) if noise else CAP_DB

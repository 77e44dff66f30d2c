"""A file that would be larger than its original keeps weights in float, or is its original.

What turns integers into floats again takes a few hundred bytes for each weight: small weights save
less than that. And a weight that nodes of the original compute takes no room there at all.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection
from dataclasses import replace
from functools import cache

from quant_core.config import Mode
from quant_core.optimize.applied import to_text
from quant_core.plan.make import named_nodes, with_choice
from quant_core.plan.types import IN_FLOAT, Compute, NodeChoice, NodePlan, Storage
from quant_core.search.calibrated import CalibratedModel
from quant_core.search.candidate import Candidate
from quant_core.text import counted

# In this order: integers that are only stored take the fewest nodes around them.
CHOICES = (IN_FLOAT, NodeChoice(Compute.FLOAT, Storage.FLOAT32))
MODES = (Mode.AUTO, Mode.WEIGHT_ONLY)  # others are requested for their computation, not for bytes
FEW = "few weights: the file would exceed its original"
METADATA_BYTES = 128  # of what the finished file says of itself, beside its rewrites


def not_larger(calibrated: CalibratedModel, best: Candidate, float_size_bytes: int) -> Candidate:
    """The candidate whose file is no larger than its original, with the fewest nodes changed.

    1. The nodes with the fewest weights are changed first: they compute in float, and only if all
       of them together are not enough, they store floats too.
    2. Nodes whose bits were chosen by name stay as they are.
    3. Where nothing is enough, no weight is rounded, to integers or to float16.
    """
    most_bytes = _most_bytes(best, float_size_bytes)
    found = best
    for choice in CHOICES:  # 1.
        if found.size_bytes <= most_bytes or best.plan.config.mode not in MODES:
            return found
        found = _changed(calibrated, best, choice, most_bytes)
    return found  # 3.


def fits(best: Candidate, float_size_bytes: int) -> bool:
    """Whether the candidate's file is no larger than its original, or may be."""
    is_free = best.plan.config.mode not in MODES
    return is_free or best.size_bytes <= _most_bytes(best, float_size_bytes)


def _most_bytes(best: Candidate, float_size_bytes: int) -> int:
    """The most bytes that leave room for the metadata of the finished file."""
    return float_size_bytes - METADATA_BYTES - len(to_text(best.plan.rewrites))


def _changed(
    calibrated: CalibratedModel, best: Candidate, choice: NodeChoice, most_bytes: int
) -> Candidate:
    """The candidate with this choice for as few nodes as are enough, or for all."""
    named = named_nodes(calibrated.model, best.plan)
    weighted = [n for n in best.plan.weighted if n.weight_storage.bits < 32]
    free = [n for n in weighted if n.node not in named]  # 2.
    nodes = [n.node for n in sorted(free, key=lambda n: n.elements)]

    @cache
    def candidate(count: int) -> Candidate:
        if not count:
            return best
        plan = with_choice(calibrated.model, best.plan, nodes[:count], choice)
        plan = replace(plan, nodes=tuple(_explained(n, nodes[:count]) for n in plan.nodes))
        return calibrated.build(
            plan, f"{best.label}, {counted(count, 'node')} with few weights in float"
        )

    counts = range(len(nodes) + 1)
    enough = bisect_left(counts, True, key=lambda n: candidate(n).size_bytes <= most_bytes)
    return candidate(min(enough, len(nodes)))


def _explained(planned: NodePlan, changed: Collection[str]) -> NodePlan:
    if planned.node not in changed:
        return planned
    return replace(planned, reason=FEW)

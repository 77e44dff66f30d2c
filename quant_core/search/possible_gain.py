"""Whether integers can make a model faster at all: Amdahl's law, before anything is tried."""

from __future__ import annotations

import math
from collections.abc import Collection
from functools import partial
from pathlib import Path

import onnx_ir as ir

from quant_core.evaluate.kernels import profile_kernels
from quant_core.evaluate.timing_cache import Cost, TimingCache
from quant_core.model.session import Feed
from quant_core.plan.targets import Runtime
from quant_core.plan.types import QuantPlan
from quant_core.search.bench import model_on
from quant_core.search.one_run import one_run
from quant_core.search.policy import POLICY
from quant_core.search.prepared import timed_in
from quant_core.text import digest_of

QUICK_MS = 2.0  # of CPU time; a model that takes less is raced as soon as profiled


def can_gain(bound: Cost | None) -> bool:
    """Whether integers may make the model faster for the user, by what `most_gain` found."""
    return bound is None or math.log2(bound.speedup) >= POLICY.real_gain


def most_gain(
    model: ir.Model,
    plan: QuantPlan,
    original: Path,
    feed: Feed,
    costs: TimingCache,
) -> Cost | None:
    """The time of the float model, and how much faster it would be if all that may compute in
    integers took no time; None where that is not known: what loops and branches compute is timed
    with them, and what takes no time need not be profiled.

    plan      covers all that may compute in integers
    original  the float model's file
    feed      what it is timed on

    Raises: ModelError if the model does not run.
    """
    may_be_integer = {n.node for n in plan.nodes if n.weights or n.compute.is_integer}
    own = {node.name for node in model.graph}
    if timed_in(plan.target) is not Runtime.ONNXRUNTIME or not may_be_integer <= own:
        return None
    if one_run(original, feed, costs).float_ms < QUICK_MS:
        return None
    nodes = digest_of(repr(sorted(may_be_integer)).encode())
    what = f"{model_on(costs.digest_of(original), feed)} without nodes {nodes}"
    return costs.of(what, partial(_without, may_be_integer, model, feed))


def _without(nodes: Collection[str], model: ir.Model, feed: Feed) -> Cost:
    """The time of all kernels, and how much faster they are without those that may stand for these
    nodes.
    """
    kernels = profile_kernels(model, feed, seconds=POLICY.profile_seconds)
    left = sum(k.ms for k in kernels if k.covers and not {*k.covers} & {*nodes})
    total = sum(k.ms for k in kernels)
    return Cost(total, total / max(left, 1e-9 * total))

"""Whether integers can make a model faster at all: Amdahl's law, before anything is tried."""

from __future__ import annotations

import math
import time
from collections.abc import Collection
from functools import partial

import onnx_ir as ir

from quant_core.data.sources import Feed
from quant_core.evaluate.kernels import profile_kernels
from quant_core.evaluate.timing_cache import Cost
from quant_core.model.session import run
from quant_core.plan.targets import Runtime
from quant_core.plan.types import QuantPlan
from quant_core.search.bench import Bench
from quant_core.search.policy import POLICY

QUICK_S = 2e-3  # of CPU time; a model that takes less is raced as soon as profiled


def can_gain(model: ir.Model, plan: QuantPlan, bench: Bench) -> bool:
    """Whether the float model would be faster for the user if all that may compute in integers took
    no time. It may be where that is not known: what loops and branches compute is timed with them.

    plan  covers all that may compute in integers

    Raises: ModelError if the model does not run.
    """
    feed = bench.samples[0]
    may_be_integer = {n.node for n in plan.nodes if n.weights or n.compute.is_integer}
    own = {node.name for node in model.graph}
    if bench.timed_in is not Runtime.ONNXRUNTIME or not may_be_integer <= own:
        return True
    began_at = time.thread_time()
    run(bench.reference.session, feed)
    if time.thread_time() - began_at < QUICK_S:
        return True
    what = f"{bench.described(plan, feed)} without what may compute in integers"
    bound = bench.costs.of(what, partial(_without, may_be_integer, model, feed))
    return math.log2(bound.speedup) >= POLICY.real_gain


def _without(nodes: Collection[str], model: ir.Model, feed: Feed) -> Cost:
    """The time of all kernels, and how much faster they are without those that may stand for these
    nodes.
    """
    kernels = profile_kernels(model, feed, seconds=POLICY.profile_seconds)
    left = sum(k.ms for k in kernels if k.covers and not {*k.covers} & {*nodes})
    total = sum(k.ms for k in kernels)
    return Cost(total, total / max(left, 1e-9 * total))

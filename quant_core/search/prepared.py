"""The float model that plans are made of: prepared, and rewritten exactly."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir

from quant_core.config import QuantConfig
from quant_core.data.for_model import samples_for
from quant_core.data.samples import Samples
from quant_core.data.spec import SampleSpec
from quant_core.deadline import NO_DEADLINE, Deadline
from quant_core.errors import DataError, ModelError
from quant_core.evaluate.in_openvino import openvino_version
from quant_core.evaluate.timing import Timing, measure
from quant_core.evaluate.timing_cache import TimingCache
from quant_core.model import files
from quant_core.model.prepare import prepare
from quant_core.optimize.opened import OpenedModel
from quant_core.optimize.rules import EXACT, FOR_FLOAT_CONVS, PRUNE, TIMED
from quant_core.optimize.run import LEAST_GAIN, Optimized, Speedup, follow, optimize
from quant_core.plan.targets import TARGETS, Runtime, find_target, host_target_name
from quant_core.plan.types import QuantPlan
from quant_core.search.policy import POLICY


def prepare_optimized(
    path: str | Path,
    config: QuantConfig,
    samples: Samples | None,
    costs: TimingCache,
    deadline: Deadline = NO_DEADLINE,
    *,
    stays_float: bool = False,
) -> Optimized:
    """The model of that file, prepared, pruned, and rewritten unless the config leaves it as it is.

    samples      the first ones check that outputs stay the same, and time rewrites; None for random
                 ones. If the model runs on none of these, rewrites are trusted, and none is timed
    costs        what was timed before, and what will be
    deadline     of all work on the model; rewrites take a part of it
    stays_float  whether no weight is going to be stored in integers

    A model of more than 2 GB is not rewritten: each attempt would take its memory again.

    Raises: as `prepare`.
    """
    feeds = _feeds(path, config, samples)
    model = prepare(path, feeds, qat=config.qat, sizes=config.fix_shape, stays_float=stays_float)
    target = find_target(config.target)
    rules = (*PRUNE[config.prune], *((*EXACT, *target.rewrites) if config.optimize else ()))
    if not rules or files.is_large(model):
        return Optimized(model, (), ())
    is_timed = config.optimize and timed_in(target.name) is Runtime.ONNXRUNTIME
    speedup = _speedup(feeds[0], costs) if is_timed and feeds else None
    # Without samples no Conv gets ranges, and so none computes in integers.
    skipped = () if stays_float or samples is None else FOR_FLOAT_CONVS
    timed = [rule for rule in TIMED if rule not in skipped]
    stage = deadline.of_stage(POLICY.stage_share)
    return optimize(model, feeds, speedup, rules, stage, timed=timed)


def prepare_as_planned(path: str | Path, plan: QuantPlan, samples: Samples | None) -> ir.Model:
    """The model of that file, prepared, and rewritten as the plan says.

    Raises: as `prepare`; ModelError if it is the plan of another model.
    """
    config = plan.config
    model = prepare(path, _feeds(path, config, samples), qat=config.qat, sizes=config.fix_shape)
    return follow(model, plan.rewrites)


def is_faster(
    path: str | Path,
    model: ir.Model,
    config: QuantConfig,
    samples: Samples | None,
    costs: TimingCache,
    *,
    growth: float,
) -> bool:
    """Whether the model is faster than that of the file, by more than the noise of the clock and
    what more bytes cost.

    samples  both run on the first; None for a random one. If it runs on none, nobody can tell
    growth   the bytes of its file over those of the other
    """
    feeds = _feeds(path, config, samples)
    if not feeds:
        return False
    before, after = OpenedModel(files.load(path)), OpenedModel(model)
    least: float = LEAST_GAIN * growth**POLICY.doublings_per_half_size
    return _speedup(feeds[0], costs)(before, after) >= least


def first_feeds(samples: Samples) -> list[Any]:
    """The first few samples, on which a change of structure is checked to change no output."""
    return [samples[i] for i in range(min(POLICY.prepare_samples, len(samples)))]


def _feeds(path: str | Path, config: QuantConfig, samples: Samples | None) -> list[Any]:
    """The first few samples; random ones for None, or no feeds if the model runs on none."""
    if samples is not None:
        return first_feeds(samples)
    spec = SampleSpec(count=POLICY.prepare_samples)
    try:
        return first_feeds(samples_for(path, spec, sizes=config.fix_shape))
    except (DataError, ModelError):
        return []


def timed_in(target: str) -> Runtime | None:
    """The runtime in which what is timed on this host holds for a model for this target; None if
    there is none, or it is not installed.
    """
    found = TARGETS[target]
    if host_target_name() not in found.timed_on:
        return None
    is_missing = found.timed_in is Runtime.OPENVINO and openvino_version() is None
    return None if is_missing else found.timed_in


def _speedup(feed: Mapping[str, Any], costs: TimingCache) -> Speedup:
    """How much faster the second of two models is on this feed: both on one thread, in turn."""
    shapes = {name: list(x.shape) for name, x in feed.items()}

    def speedup(before: OpenedModel, after: OpenedModel) -> float:
        what = f"model {before.digest()} as {after.digest()} on {shapes}"
        return costs.of(what, partial(_time, before, after, feed)).speedup

    return speedup


def _time(before: OpenedModel, after: OpenedModel, feed: Mapping[str, Any]) -> Timing:
    seconds = POLICY.rewrite_seconds
    return measure(before.session, after.session, feed, seconds=seconds, clock=time.thread_time)

"""The plan that calibration covers and a search starts from."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from quant_core.config import Mode, QuantConfig
from quant_core.data.samples import Samples
from quant_core.deadline import NO_DEADLINE, Deadline
from quant_core.errors import ModelError, RequestError
from quant_core.evaluate.timing_cache import TimingCache
from quant_core.model import graph
from quant_core.model.opset import OPSET_INT4, raise_opset
from quant_core.model.providers import find_provider
from quant_core.optimize.applied import Applied
from quant_core.plan.make import make_plan, with_choice
from quant_core.plan.operators import RULES, has_weights
from quant_core.plan.targets import find_target
from quant_core.plan.types import IN_FLOAT, IN_INT8, Compute, NodeChoice, QuantPlan
from quant_core.search.job import QuantJob, has_time_to_calibrate
from quant_core.search.one_run import affordable_samples
from quant_core.search.policy import POLICY
from quant_core.search.possible_gain import can_gain, most_gain
from quant_core.search.prepared import prepare_optimized

UNMEASURED = "its integer kernel needs samples"


def prepare_and_plan(
    path: str | Path,
    config: QuantConfig,
    samples: Samples | None,
    costs: TimingCache,
    deadline: Deadline = NO_DEADLINE,
    *,
    is_free: bool = True,
) -> tuple[ir.Model, QuantPlan, bool]:
    """The prepared model of that file, its first plan, and whether there are samples, and time, to
    calibrate. Arguments and errors are those of `prepare_optimized` and `first_plan`.

    is_free  whether weights may be only stored, where nothing could gain by more: without a
             contract, and where no front is asked for
    """
    found = prepare_optimized(path, config, samples, costs, deadline)
    model = found.model
    measured = samples is not None and has_time_to_calibrate(config, deadline)
    plan = first_plan(model, config, measured=measured, rewrites=found.applied)
    if is_free and config.mode == Mode.AUTO and samples is not None and measured:
        with suppress(ModelError):  # calibration tells why it does not run
            bound = most_gain(model, plan, Path(path), samples[0], costs)
            if bound is not None and not can_gain(bound):
                few = max(POLICY.rounding_samples, affordable_samples(bound))
                plan = only_stored(model, plan, few)
    return model, plan, measured


def only_stored(model: ir.Model, plan: QuantPlan, few: int) -> QuantPlan:
    """The plan with weights that are only stored, as integers cannot gain; those in 8 bits are
    rounded for a few samples.
    """
    stored = with_choice(model, plan, [n.node for n in plan.weighted], IN_FLOAT)
    few = POLICY.gram_samples if stored.in_four_bits else min(few, POLICY.gram_samples)
    return replace(stored, rounding_samples=few)


def first_plan(
    model: ir.Model, config: QuantConfig, *, measured: bool, rewrites: Sequence[Applied] = ()
) -> QuantPlan:
    """The plan that calibration covers: in mode auto all that may become static in a variant.

    measured  whether there are samples to measure ranges on
    rewrites  how the model was rewritten after it was prepared

    Raises: RequestError if static is requested without samples, or an execution provider that
    onnxruntime does not know; as `make_plan`.
    """
    find_provider(config.provider)  # nothing else asks for it where nothing is measured
    if config.mode == Mode.STATIC and not measured:
        raise RequestError(
            "is static, which needs calibration",
            "mode",
            "Give data, or mode dynamic or weight_only",
        )
    target = find_target(config.target)
    if config.mode != Mode.AUTO or measured:
        return make_plan(model, config, target, rewrites=rewrites)
    choices = {}
    for node in filter(has_weights, graph.nodes_of(model)):
        can_be_dynamic = RULES[node.op_type].dynamic and Compute.DYNAMIC in target.times
        compute = Compute.DYNAMIC if can_be_dynamic else Compute.FLOAT
        choices[str(node.name)] = NodeChoice(compute, reason=UNMEASURED)
    return make_plan(model, config, target, choices, rewrites=rewrites)


def storable_plan(job: QuantJob) -> tuple[QuantPlan, str]:
    """The plan that the model can hold, and why 4 bits become 8 in it or later in the search.

    Whether a model of an older opset can hold 4 bits is known only by converting it: ONNX's
    converter has no dry run. No weight is copied for that.

    Raises: ModelError if the model cannot hold 4 bits and no contract allows others.
    """
    four = job.plan.in_four_bits
    if four and graph.opset(job.model) < OPSET_INT4:
        try:
            raise_opset(job.model, OPSET_INT4)
        except ModelError as error:
            if job.contract is None:
                hint = f"{error.hint}, or ask for 8 bits, or a contract"
                raise ModelError(error.problem, four[0], hint) from error
            return with_choice(job.model, job.plan, four, IN_INT8), error.problem
    return job.plan, "4 bits break the contract"

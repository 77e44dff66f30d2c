"""Which variants are worth a trial after those before them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from quant_core.errors import ModelError
from quant_core.evaluate.timing_cache import Cost
from quant_core.numerics.granularity import PerTensor
from quant_core.plan.make import with_choice
from quant_core.plan.types import IN_FLOAT, Compute, NodeChoice
from quant_core.search.variants import (
    VARIANTS,
    Trial,
    Variant,
    may_be_worth_trying,
    worth_trying,
)
from tests.models import sketch
from tests.oracle.cases import weights
from tests.unit.search.problems import Problem, convs, deep


def worth_a_trial(problem: Problem, trials: list[Trial]) -> list[Variant]:
    """The rows of VARIANTS that are worth a trial after these."""
    return [
        variant
        for variant in VARIANTS
        if may_be_worth_trying(variant, problem.plan, trials, None)
        and worth_trying(variant, variant.plan(problem.model, problem.plan), trials)
    ]


@pytest.mark.parametrize(("bits", "is_worth_it"), [(4, True), (8, False)])
def test_blocks_are_tried_if_there_are_4_bit_weights(bits, is_worth_it):
    problem = Problem(deep(3), bits=bits, layer_bits={"*": bits})
    dynamic = next(v for v in VARIANTS if v.matmul is Compute.DYNAMIC)
    plan = dynamic.plan(problem.model, problem.plan)
    trials = [Trial(dynamic.label, plan, ModelError("does not load"), dynamic)]

    variants = worth_a_trial(problem, trials)

    assert (Compute.BLOCKS in {v.matmul for v in variants}) == is_worth_it


@pytest.mark.parametrize(
    ("options", "sqnr_db", "is_worth_it"),
    [
        ({}, 40.0, True),
        ({}, 20.0, False),
        ({}, None, False),
        ({"per_channel": False}, 40.0, False),
        ({"bits": 4}, 40.0, False),
    ],
)
def test_one_scale_per_weight_is_tried_if_fidelity_is_to_spare(options, sqnr_db, is_worth_it):
    problem = Problem(deep(3), **options, layer_bits={"*": options.get("bits", 8)})
    dynamic = next(v for v in VARIANTS if v.matmul is Compute.DYNAMIC)
    plan = dynamic.plan(problem.model, problem.plan)
    judged = problem.bench.judge_fidelity(problem.calibrated.build(plan, dynamic.label))
    outputs = tuple(replace(o, sqnr_db=sqnr_db) for o in judged.fidelity.per_output)
    fidelity = replace(judged.fidelity, sqnr_db=sqnr_db, per_output=outputs)
    trials = [Trial(dynamic.label, plan, replace(judged, fidelity=fidelity), dynamic)]

    variants = worth_a_trial(problem, trials)

    assert any(v.granularity == PerTensor() for v in variants) == is_worth_it


@pytest.mark.parametrize(("speedup", "is_worth_it"), [(0.85, True), (0.75, False)])
def test_one_scale_per_weight_is_tried_where_it_could_make_up_for_what_integers_lose(
    speedup, is_worth_it
):
    problem = Problem(deep(3))
    trials = []
    for compute, speed in ((Compute.FLOAT, 1.0), (Compute.DYNAMIC, speedup)):
        choice = NodeChoice(compute)
        plan = with_choice(problem.model, problem.plan, ("l1", "l2", "y"), choice)
        judged = problem.bench.judge_fidelity(problem.calibrated.build(plan, str(compute)))
        trials.append(Trial(str(compute), plan, replace(judged, cost=Cost(1.0, speed))))

    variants = worth_a_trial(problem, trials)

    assert any(v.granularity == PerTensor() for v in variants) == is_worth_it


@pytest.mark.parametrize(("float_nodes", "is_worth_it"), [(0, False), (1, False), (2, True)])
def test_weights_that_are_only_stored_are_tried_where_most_nodes_compute_in_float(
    float_nodes, is_worth_it
):
    problem = Problem(convs())
    nodes = [n.node for n in problem.plan.nodes if n.weights][:float_nodes]
    plan = with_choice(problem.model, problem.plan, nodes, IN_FLOAT)
    judged = problem.bench.judge_fidelity(problem.calibrated.build(plan, "fast and faithful"))
    trials = [Trial("fast and faithful", plan, replace(judged, cost=Cost(1.0, 1.5)))]

    assert trials[0].candidate.reaches_aim
    assert (VARIANTS[-1] in worth_a_trial(problem, trials)) == is_worth_it


@pytest.mark.parametrize(
    ("speedup", "is_above", "is_worth_it"),
    [(0.8, True, True), (1.3, True, True), (2.0, True, False), (2.0, False, True)],
)
def test_dynamic_convs_are_tried_where_static_ones_are_slow_or_inexact(
    speedup, is_above, is_worth_it
):
    problem = Problem(convs())
    judged = problem.bench.judge_fidelity(problem.calibrated.build(problem.plan, "static"))
    outputs = judged.fidelity.per_output
    if not is_above:
        outputs = tuple(replace(o, centred_db=15.0, lower_db=14.0) for o in outputs)
    judged = replace(judged, fidelity=replace(judged.fidelity, per_output=outputs))
    trials = [Trial("static", problem.plan, replace(judged, cost=Cost(1.0, speedup)), VARIANTS[0])]

    tried = [v for v in worth_a_trial(problem, trials) if v.pointwise is not None]

    assert bool(tried) == is_worth_it
    if tried:
        plan = tried[0].plan(problem.model, problem.plan)
        assert {str(n.compute) for n in plan.nodes if n.weights} == {"dynamic"}


@pytest.mark.parametrize(
    ("output", "is_worth_it"),
    [
        (("int64", "", "y = ArgMax<axis = 1, keepdims = 0>(b)"), False),
        (("float", ",32", "y = Identity(b)"), True),
    ],
    ids=["integer", "float"],
)
def test_fidelity_that_is_unknown_is_not_spent(output, is_worth_it):
    """Of integer outputs only the agreement is known."""
    text = "(float[n,32] x) => ({0}[n{1}] y) {{ a = MatMul(x, u) b = MatMul(a, v) {2} }}"
    model = sketch(text.format(*output), weights(u=(32, 32), v=(32, 32)))

    found = Problem(model, timed_in=None).search()  # so that no candidate is faster by luck

    one_scale = next(v for v in VARIANTS if v.granularity == PerTensor())
    assert (one_scale.label in {row["candidate"] for row in found.trace}) == is_worth_it

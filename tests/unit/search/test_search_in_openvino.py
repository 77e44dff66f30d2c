"""A search for OpenVINO times candidates there, where it is installed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import onnx_ir as ir
import pytest

from quant_core.errors import ModelError
from quant_core.evaluate.kernels import Arithmetic, Kernel
from quant_core.evaluate.timing_cache import Cost, TimingCache
from quant_core.model import graph
from quant_core.plan.targets import Runtime
from quant_core.plan.types import Compute
from quant_core.search.assignments import float_groups
from quant_core.search.bench import Bench
from quant_core.search.minimum_cut import NodeCost, TensorCost
from quant_core.search.node_costs import LEAST_MS, node_costs
from tests.unit.search.problems import Problem, convs


def openvino_with(
    monkeypatch, slow: str, cannot_run: str = "", conversion_ms: float | None = None
) -> None:
    """From now on this Conv takes ten times as long in integers in OpenVINO, the others half.

    cannot_run     which models do not run there: "float", or "integers" for the slow Conv in
                   integers
    conversion_ms  of the kernel that a QuantizeLinear becomes; None: it is merged into another
    """

    def is_rounded(node: ir.Node) -> bool:
        return node.op_type == "Conv" and graph.is_dequantized(node.inputs[0])

    def kernels(model: ir.Model) -> list[Kernel]:
        convs = [n for n in model.graph if n.op_type in ("Conv", "FusedConv")]
        ms = {n: (10.0 if n.name == slow else 0.5) if is_rounded(n) else 1.0 for n in convs}
        if conversion_ms is not None:
            conversions = [n for n in model.graph if n.op_type == "QuantizeLinear"]
            ms |= dict.fromkeys(conversions, conversion_ms)
        return [Kernel(n.name, n.op_type, Arithmetic.INT8, t, (n.name,)) for n, t in ms.items()]

    def race(original: object, model: ir.Model, *_: object) -> Cost:
        if cannot_run == "float":
            raise ModelError("OpenVINO cannot run it", str(original))
        if cannot_run and any(is_rounded(n) for n in model.graph if n.name == slow):
            raise ModelError("OpenVINO cannot run it", "model.onnx")
        return Cost(3.0, 3.0 / sum(kernel.ms for kernel in kernels(model)))

    def profile(models: Sequence[ir.Model], *_: object) -> list[list[Kernel]]:
        return [kernels(model) for model in models]

    monkeypatch.setattr("quant_core.search.bench.race_in_openvino", race)
    monkeypatch.setattr("quant_core.search.node_costs.profile_in_openvino", profile)


def test_a_node_that_integers_slow_in_openvino_computes_in_float_there(monkeypatch):
    problem = Problem(convs(), timed_in=Runtime.OPENVINO, mode="static")
    slow = problem.plan.nodes[1].node
    openvino_with(monkeypatch, slow)

    best = problem.search().best

    assert [n.node for n in best.plan.nodes if n.compute is Compute.FLOAT] == [slow]
    assert best.speedup == pytest.approx(3.0 / 2.0)


def test_a_conversion_takes_in_openvino_what_its_own_kernel_takes(monkeypatch):
    """And nothing where it is merged into the kernel that writes the tensor."""
    problem = Problem(convs(), timed_in=Runtime.OPENVINO, mode="static")
    candidate = problem.calibrated.build(problem.plan, "static")

    def of_inputs(conversion_ms: float | None) -> list[float]:
        openvino_with(monkeypatch, "", conversion_ms=conversion_ms)
        tensors = node_costs(problem.model, candidate, replace(problem.bench, costs=TimingCache()))[
            1
        ]
        return [tensor.conversion_ms for tensor in tensors if tensor.writer is None]

    assert of_inputs(0.6) == [0.6]
    assert of_inputs(None) == [LEAST_MS]


def test_a_race_says_nothing_of_conversions_that_take_less_than_it_errs(monkeypatch):
    """The middle one of three Convs is slower in integers, by more than its conversions take."""
    problem = Problem(convs(), timed_in=Runtime.OPENVINO, mode="static")
    first, slow, last = (node.node for node in problem.plan.nodes)
    others = dict.fromkeys((first, last, "Add@0", "Add@1"), NodeCost(0.5, 1.0, 0.0))
    costs = others | {slow: NodeCost(1.1, 1.0, 0.0)}
    tensors = [TensorCost(first, (slow,), 0.01, False), TensorCost(slow, (last,), 0.01, False)]
    monkeypatch.setattr("quant_core.search.assignments.node_costs", lambda *_: (costs, tensors))
    start = problem.calibrated.build(problem.plan, "static")

    def first_group(unlucky_ms: float) -> list[str]:
        """What goes into float first if the race of the second model takes that much longer."""
        monkeypatch.setattr(Bench, "time", lambda *_: Cost(4.0, 4.0 / (3.02 + unlucky_ms)))
        timed = replace(start, cost=Cost(4.0, 4.0 / 3.1))
        return float_groups(problem.calibrated, timed, problem.bench)[0]

    assert first_group(0.0) == first_group(0.05) == first_group(0.5) == [slow]


def test_what_openvino_cannot_run_is_not_chosen(monkeypatch):
    problem = Problem(convs(), timed_in=Runtime.OPENVINO)
    slow = problem.plan.nodes[1].node
    openvino_with(monkeypatch, slow, cannot_run="integers")

    found = problem.search()

    assert "OpenVINO cannot run it" in found.trace[0]["error"]
    assert slow in {n.node for n in found.best.plan.nodes if n.compute is Compute.FLOAT}


def test_where_openvino_cannot_run_the_float_model_nothing_is_timed(monkeypatch):
    problem = Problem(convs(), timed_in=Runtime.OPENVINO, mode="static")
    openvino_with(monkeypatch, "", cannot_run="float")

    best = problem.search().best

    assert best.speedup is None
    assert all(n.compute.is_integer for n in best.plan.nodes)

"""One way through the core, from a float model to a quantized one and what both compute."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from quant_core.calibrate.observe import Statistics, observe
from quant_core.config import QuantConfig
from quant_core.model.prepare import prepare
from quant_core.model.session import open_session, optimized_graph, run
from quant_core.numerics.granularity import PerTensor
from quant_core.plan.make import make_plan, replan
from quant_core.plan.targets import TARGETS
from quant_core.plan.types import Compute, NodeChoice, NodePlan, QuantPlan
from quant_core.rewrite.apply import Quantized, apply_plan
from tests.models import random_feed
from tests.oracle.cases import CASES

Feed = Mapping[str, np.ndarray]


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """A float model, as it came and as it is planned, and four feeds for it."""

    original: onnx.ModelProto
    model: ir.Model
    feeds: list[dict[str, np.ndarray]]

    @cache  # noqa: B019 - few models, which their tests share
    def floats(self) -> list[list[np.ndarray]]:
        session = open_session(self.original.SerializeToString())
        return [run(session, feed) for feed in self.feeds]


@dataclass(frozen=True, slots=True, eq=False)
class Made:
    """A quantized model and the plan that it was made by."""

    plan: QuantPlan
    stats: Statistics
    quantized: Quantized
    model: onnx.ModelProto

    def outputs(self, feeds: list[dict[str, np.ndarray]]) -> list[list[np.ndarray]]:
        session = open_session(self.model.SerializeToString())
        return [run(session, feed) for feed in feeds]

    def kernels(self) -> list[str]:
        """Operators that run, without what only changes types and places."""
        borders = (
            "QuantizeLinear",
            "DequantizeLinear",
            "Transpose",
            "Reshape",
            "Squeeze",
            "Unsqueeze",
            "Flatten",
        )
        ran = (node.op_type for node in optimized_graph(self.model.SerializeToString()).graph.node)
        return [op for op in ran if op not in borders]


@cache
def prepared(case: str) -> Prepared:
    return prepare_proto(CASES[case]())


def prepare_proto(model: onnx.ModelProto) -> Prepared:
    feeds = [random_feed(model, seed) for seed in range(4)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "float.onnx")
        onnx.save(model, path)
        return Prepared(model, prepare(path, feeds[:1]), feeds)


def make(
    given: Prepared,
    target: str = "x86",
    compute: Mapping[str, Compute] | None = None,
    *,
    one_scale: bool = False,
    **options: object,
) -> Made:
    plan = make_plan(given.model, QuantConfig.from_dict(options), TARGETS[target])
    granularity = PerTensor() if one_scale else None
    changes = {
        n.node: NodeChoice((compute or {}).get(n.node), granularity=granularity)
        for n in plan.nodes
        if n.weights
    }
    plan = replan(given.model, plan, changes)
    stats = observe(ir.to_proto(given.model).SerializeToString(), plan, given.feeds)
    quantized = apply_plan(given.model, plan, stats)
    return Made(plan, stats, quantized, ir.to_proto(quantized.model))


def planned(plan: QuantPlan, node: str) -> NodePlan:
    """The plan of that node."""
    return next(n for n in plan.nodes if n.node == node)


def sqnr_db(wanted: list[list[np.ndarray]], got: list[list[np.ndarray]]) -> float:
    """Of the worst float output, over all feeds."""
    worst = 200.0
    for i in range(len(wanted[0])):
        a, b = (
            np.concatenate([np.ravel(feed[i]) for feed in outputs]).astype(np.float64)
            for outputs in (wanted, got)
        )
        noise = float(np.square(a - b).sum())
        if noise:
            worst = min(worst, 10 * np.log10(float(np.square(a).sum()) / noise))
    return worst

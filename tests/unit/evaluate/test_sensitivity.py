"""What a node costs is told node by node: alone, and with all before it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx import helper

from quant_core.calibrate.observe import observe
from quant_core.config import QuantConfig
from quant_core.evaluate.power import NodePower, damage_of
from quant_core.evaluate.sensitivity import damage, powers
from quant_core.plan.make import make_plan
from quant_core.plan.targets import TARGETS
from quant_core.rewrite.apply import apply_plan
from tests.models import one_graph

FEEDS = [
    {"x": np.random.default_rng(k).standard_normal((4, 32), dtype=np.float32)} for k in range(4)
]


def chain() -> ir.Model:
    rng = np.random.default_rng(0)
    weights = {f"w{k}": rng.standard_normal((32, 32), dtype=np.float32) / 6 for k in range(3)}
    nodes = [
        helper.make_node("MatMul", [["x", "a", "b"][k], f"w{k}"], [["a", "b", "y"][k]], f"m{k}")
        for k in range(3)
    ]
    return ir.from_proto(one_graph(nodes, weights, input=("n", 32), output=("n", 32)))


def costs(**config: object) -> dict[str, tuple[float, float]]:
    model = chain()
    plan = make_plan(
        model, QuantConfig.from_dict({"mode": "static", **config}), TARGETS["portable"]
    )
    stats = observe(ir.to_proto(model).SerializeToString(), plan, FEEDS)
    rows = damage(model, apply_plan(model, plan, stats).model, FEEDS)
    return {row.node: (row.alone_db, row.so_far_db) for row in rows}


def test_only_what_is_quantized_costs_anything():
    assert list(costs(exclude=["m0", "m2"])) == ["m1"]


def test_later_nodes_pay_for_earlier_ones_but_are_not_blamed_for_them():
    coarse, fine = costs(layer_bits={"m0": 4}), costs()

    assert coarse["m0"][0] < fine["m0"][0] - 6
    assert coarse["m2"][0] == fine["m2"][0]
    assert coarse["m2"][1] < fine["m2"][1] - 6
    assert fine["m0"][0] == pytest.approx(fine["m0"][1], abs=0.1)  # nothing comes before it


def test_a_model_against_itself_costs_nothing():
    model = chain()

    assert damage(model, model, FEEDS) == []


@pytest.mark.parametrize("shards", [2, 3, 5])
def test_shares_of_the_samples_tell_the_same_to_the_last_bit(shards):
    model = chain()
    plan = make_plan(model, QuantConfig(mode="static"), TARGETS["portable"])
    quantized = apply_plan(
        model, plan, observe(ir.to_proto(model).SerializeToString(), plan, FEEDS)
    ).model

    parts = [powers(model, quantized, FEEDS[k::shards]) for k in range(shards)]

    told = [NodePower(**power.to_dict()) for part in reversed(parts) for power in part]
    assert sorted(map(repr, damage_of([told]))) == sorted(
        map(repr, damage(model, quantized, FEEDS))
    )

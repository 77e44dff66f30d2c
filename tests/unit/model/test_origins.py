"""Names of the original model mean the nodes that its nodes became."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from quant_core.config import QuantConfig
from quant_core.model.origins import matches, origins_of
from quant_core.model.prepare import prepare
from quant_core.plan.make import make_plan
from quant_core.plan.targets import TARGETS
from tests.models import one_graph, sketch


def prepared(folder):
    weights = {
        "w": np.ones((32, 32), np.float32),
        "b": np.ones(32, np.float32),
        "v": np.full((32, 8), 2, np.float32),
    }
    text = "(float[n,32] x) => (float[n,8] y) { a = MatMul(x, w) c = Add(a, b) y = MatMul(c, v) }"
    onnx.save(sketch(text, weights), folder / "model.onnx")
    return prepare(folder / "model.onnx")


@pytest.mark.parametrize("glob", ["a", "c", "w"])
def test_a_fused_node_is_excluded_by_each_name_that_it_stands_for(tmp_path, glob):
    model = prepared(tmp_path)

    plan = make_plan(model, QuantConfig(exclude=(glob,), mode="dynamic"), TARGETS["x86"])

    assert {n.op_type: n.is_rounded for n in plan.nodes} == {"Gemm": False, "MatMul": True}


def test_a_node_is_known_by_its_weight_whatever_becomes_of_that(tmp_path):
    assert origins_of(prepared(tmp_path))["y"] == ["v"]


@pytest.mark.parametrize("glob", ["k", "k_out", "turn"])
def test_a_weight_is_excluded_by_what_it_is_made_of(tmp_path, glob):
    weight = onnx.numpy_helper.from_array(np.eye(32, dtype=np.float32) + 1)
    nodes = [
        onnx.helper.make_node("Constant", [], ["k_out"], "k", value=weight),
        onnx.helper.make_node("Transpose", ["k_out"], ["kt"], "turn", perm=[1, 0]),
        onnx.helper.make_node("MatMul", ["x", "kt"], ["y"], "product"),
    ]
    path = tmp_path / "model.onnx"
    onnx.save(one_graph(nodes, {}, input=("n", 32), output=("n", 32)), path)

    plan = make_plan(prepare(path), QuantConfig(exclude=(glob,)), TARGETS["x86"])

    assert [n.reason for n in plan.nodes] == [f"excluded by {glob}"]


@pytest.mark.parametrize(
    ("glob", "name"),
    [("blocks[0]/fc", "blocks[0]/fc"), ("blocks[0]/*", "blocks[0]/fc"), ("b[12]", "b1")],
)
def test_brackets_stand_for_themselves_or_for_a_set(glob, name):
    assert matches(glob, name)


@pytest.mark.parametrize("glob", ["second", "sec*"])
def test_the_node_that_calls_a_local_function_means_all_that_it_becomes(tmp_path, glob):
    text = """
        <ir_version: 8, opset_import: ["" : 17, "my" : 1]>
        calls (float[n,32] x, bool c) => (float[n,32] y) {
            a = my.Outer(x, u, c)
            y = my.Outer(a, v, c)
        }
        <domain: "my", opset_import: ["" : 17, "my" : 1]>
        Outer (x, w, c) => (y) { h = my.Block(x, w, c) y = Tanh(h) }
        <domain: "my", opset_import: ["" : 17]>
        Block (x, w, c) => (y) {
            y = If (c) <
                then_branch = yes () => (float[n,32] p) { m = MatMul(x, w) p = Relu(m) },
                else_branch = no () => (float[n,32] q) { q = MatMul(x, w) }
            >
        }"""
    model = onnx.parser.parse_model(text)
    model.graph.node[0].name, model.graph.node[1].name = "first", "second"
    for name in ("u", "v"):
        weight = np.random.default_rng(ord(name)).normal(size=(32, 32)).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(weight, name))
    onnx.save(model, tmp_path / "model.onnx")
    config = QuantConfig(exclude=(glob,), mode="dynamic")

    plan = make_plan(prepare(tmp_path / "model.onnx"), config, TARGETS["x86"])

    products = [n for n in plan.nodes if n.op_type == "MatMul"]
    assert {n.weights: n.is_rounded for n in products} == {("u",): True, ("v",): False}
    assert len(products) == 4

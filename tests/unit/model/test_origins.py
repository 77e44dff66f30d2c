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
from tests.models import sketch


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


def test_a_node_that_kept_its_names_has_no_origins(tmp_path):
    assert "y" not in origins_of(prepared(tmp_path))


@pytest.mark.parametrize(
    ("glob", "name"),
    [("blocks[0]/fc", "blocks[0]/fc"), ("blocks[0]/*", "blocks[0]/fc"), ("b[12]", "b1")],
)
def test_brackets_stand_for_themselves_or_for_a_set(glob, name):
    assert matches(glob, name)

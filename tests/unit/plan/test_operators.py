"""The table of operators is the one place that names an operator with a weight."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from quant_core.config import WEIGHT_METHOD_NAMES, QuantConfig
from quant_core.model.session import open_session
from quant_core.numerics.layout import Layout
from quant_core.numerics.weight_methods import WEIGHT_METHODS
from quant_core.plan.make import make_plan
from quant_core.plan.operators import RULES, Kind, Operator, multiplied_weights
from quant_core.plan.targets import TARGETS
from quant_core.rewrite.apply import apply_plan
from tests.models import normalized, sketch


def test_every_operator_with_a_weight_has_a_layout_and_says_what_it_writes():
    for name, operator in RULES.items():
        assert bool(operator.weights) == (operator.layout is not None), name
        assert operator.dynamic == (operator.dynamic_pattern is not None), name


def test_the_saturation_check_knows_the_integer_forms():
    assert multiplied_weights()["QLinearConv"] == (3,)
    assert multiplied_weights()["DynamicQuantizeLSTM"] == (1, 2)
    assert "GRU" not in multiplied_weights()


def test_every_weight_method_of_the_config_is_a_row():
    assert set(WEIGHT_METHODS) == set(WEIGHT_METHOD_NAMES)


@pytest.mark.parametrize("runtime", ["folded", "qdq"])
@pytest.mark.parametrize("bits", [8, 4])
def test_one_row_makes_a_new_operator_planned_rounded_and_rewritten(monkeypatch, bits, runtime):
    """PRelu is not in the table; its slope (C, K) is a weight with a row for each channel."""
    rng = np.random.default_rng(0)
    slope = rng.standard_normal((8, 64)).astype(np.float32)
    text = "(float[n,8,64] x) => (float[n,8,64] y) { y = PRelu(x, slope) }"
    model = normalized(sketch(text, {"slope": slope}))
    row = Operator(Kind.WEIGHT_ONLY, weights=(1,), layout=lambda node, rank: Layout((0, 1)))
    monkeypatch.setitem(RULES, "PRelu", row)
    config = QuantConfig(bits=bits, runtime=runtime, layer_bits={"*": bits})

    plan = make_plan(model, config, TARGETS["x86-vnni"])
    made = apply_plan(model, plan, None)

    (planned,) = plan.nodes
    assert (planned.op_type, planned.weights, planned.storage.bits) == ("PRelu", ("slope",), bits)
    assert made.weight_sqnr_db["y"] > {8: 40, 4: 15}[bits]
    x = -np.ones((1, 8, 64), np.float32)
    (y,) = open_session(ir.to_proto(made.model).SerializeToString()).run(None, {"x": x})
    assert 10 * np.log10(np.square(slope).sum() / np.square(slope + y[0]).sum()) == pytest.approx(
        made.weight_sqnr_db["y"], abs=0.1
    )


def test_an_operator_of_another_domain_is_not_the_one_of_its_name():
    text = """(float[1,8,4,4] x) => (float[1,16] y) {
        c = com.microsoft.nchwc.Conv(x, w) r = com.microsoft.Relu(c)
        f = Flatten(r) y = Gemm(f, u) }"""
    constants = {"w": np.ones((8, 8, 1, 1), np.float32), "u": np.ones((128, 16), np.float32)}

    plan = make_plan(normalized(sketch(text, constants)), QuantConfig(), TARGETS["x86"])

    assert {n.node: n.weights for n in plan.nodes if n.weights} == {"y": ("u",)}
    assert all(n.op_type != "Conv" for n in plan.nodes)

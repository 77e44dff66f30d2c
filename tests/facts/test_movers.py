"""The table of operators holds: elementwise ones have a QLinear kernel, moving ones take 8 bits."""

from __future__ import annotations

import numpy as np
import pytest

from quant_core.plan.operators import RULES
from tests.facts.patterns import kernels, pair

POOL = "kernel_shape = [2, 2]"
EXPRESSIONS = {
    "Add": ["Add(a, a)", "Add(a, k)", "Add(k, a)"],
    "Mul": ["Mul(a, a)", "Mul(a, k)", "Mul(k, a)"],
    "Sigmoid": ["Sigmoid(a)"],
    "LeakyRelu": ["LeakyRelu(a)", "LeakyRelu<alpha = 0.3>(a)"],
    "AveragePool": [
        f"AveragePool<{POOL}>(a)",
        f"AveragePool<{POOL}, count_include_pad = 1, pads = [1, 1, 1, 1]>(a)",
        f'AveragePool<{POOL}, auto_pad = "SAME_UPPER">(a)',
        f"AveragePool<{POOL}, ceil_mode = 1>(a)",
    ],
    "GlobalAveragePool": ["GlobalAveragePool(a)"],
    "Concat": ["Concat<axis = 1>(a, a)", "Concat<axis = 1>(a, k, a)"],
    "MaxPool": [f"MaxPool<{POOL}>(a)", f"MaxPool<{POOL}, ceil_mode = 1, pads = [1, 1, 1, 1]>(a)"],
    "Reshape": ["Reshape(a, shape)"],
    "Transpose": ["Transpose<perm = [0, 2, 3, 1]>(a)"],
    "Squeeze": ["Squeeze(a, axes)", "Squeeze(a)"],
    "Unsqueeze": ["Unsqueeze(a, axes)"],
    "Flatten": ["Flatten(a)"],
}
OPSETS = (13, 17, 19, 21, 22, 23)
CONSTANTS = {
    "k_q": np.full((1, 4, 8, 8), 130, np.uint8),
    "shape": np.array([1, -1]),
    "axes": np.array([0]),
}


def between_pairs(
    expression: str,
    opset: int = 17,
    *,
    scale: str = "s",
    zero: str = "z",
    x: str = "float[1,4,8,8] x",
):
    constant = (
        "k = DequantizeLinear(k_q, s, z)\n"
        if "k" in expression.partition("(")[2].replace("kernel", "")
        else ""
    )
    body = pair("x", "a") + constant + f"b = {expression}\n" + pair("b", "y", scale, zero)
    ran = kernels(body, CONSTANTS, x, opset, borders=True)
    return ran[1:-1] if (ran[0], ran[-1]) == ("QuantizeLinear", "DequantizeLinear") else ran


def test_every_rule_has_its_fact():
    assert EXPRESSIONS.keys() == {
        op for op, rule in RULES.items() if rule.kind in ("elementwise", "moves")
    }


@pytest.mark.parametrize("op", [op for op, rule in RULES.items() if rule.kind == "elementwise"])
def test_what_the_rules_call_elementwise_has_a_qlinear_kernel(op):
    for opset in OPSETS:
        for expression in EXPRESSIONS[op]:
            assert between_pairs(expression, opset) == [f"QLinear{op}"], (expression, opset)
            assert between_pairs(expression, opset, scale="unit_scale", zero="z0") == [
                f"QLinear{op}"
            ]


@pytest.mark.parametrize("op", [op for op, rule in RULES.items() if rule.kind == "moves"])
def test_what_the_rules_call_moving_runs_on_8_bit_data_that_keeps_its_parameters(op):
    for opset in OPSETS:
        for expression in EXPRESSIONS[op]:
            assert between_pairs(expression, opset) == [op], (expression, opset)


@pytest.mark.parametrize("op", ["AveragePool", "GlobalAveragePool", "MaxPool"])
@pytest.mark.parametrize(
    ("shape", "kernel"), [("1,4,8", "2"), ("1,4,8,8,8", "2, 2, 2")], ids=["1-D", "3-D"]
)
def test_pools_of_any_rank_run_in_8_bits(op, shape, kernel):
    expression = f"{op}<kernel_shape = [{kernel}]>(a)" if op != "GlobalAveragePool" else f"{op}(a)"

    assert between_pairs(expression, x=f"float[{shape}] x") == [
        op if op == "MaxPool" else f"QLinear{op}"
    ]


@pytest.mark.parametrize("op", ["Tanh", "Erf", "Exp", "Relu", "HardSigmoid"])
def test_operators_that_are_no_rule_stay_float_between_pairs(op):
    assert op not in RULES
    assert between_pairs(f"{op}(a)") == ["DequantizeLinear", op, "QuantizeLinear"]


def test_relu_after_an_elementwise_operator_vanishes_into_zero_point_0():
    body = pair("x", "a") + "b = Add(a, a) r = Relu(b)\n" + pair("r", "y", "s", "z0")

    assert kernels(body, {}) == ["QLinearAdd"]

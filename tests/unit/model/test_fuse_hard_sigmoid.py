"""Spelled-out hard sigmoids become one operator, and whatever only looks like one stays."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from quant_core.model.fuse_hard_sigmoid import fuse_hard_sigmoid
from quant_core.model.session import open_session
from tests.models import normalized, sketch

X = np.random.default_rng(0).standard_normal((4, 3, 8, 8), dtype=np.float32) * 5
HEAD = "(float[n,3,8,8] x) => (float[n,c,h,w] y)"
NUMBERS = {"zero": 0.0, "half": 0.5, "one": 1.0, "three": 3.0, "six": 6.0, "sixth": 1 / 6}

FUSED = {
    "hard swish": "{ a = Add(x, three) c = Clip(a, zero, six) m = Mul(x, c) y = Div(m, six) }",
    "hard swish with its inputs swapped": """{
        a = Add(three, x) c = Clip(a, zero, six) m = Mul(c, x) y = Mul(sixth, m)
    }""",
    "hard swish, divided first": """{
        a = Add(x, three) c = Clip(a, zero, six) d = Div(c, six) y = Mul(d, x)
    }""",
    "times another tensor": """{
        s = Relu(x) a = Add(s, half) c = Clip(a, zero, one) m = Mul(c, x) y = Div(m, one)
    }""",
    "no product": "{ a = Add(x, three) c = Clip(a, zero, six) y = Mul(c, sixth) }",
}
KEPT = {
    "another divisor": """{
        a = Add(x, three) c = Clip(a, zero, six) m = Mul(x, c) y = Div(m, three)
    }""",
    "no divisor": "{ a = Add(x, three) c = Clip(a, zero, six) y = Mul(x, c) }",
    "a lower bound": "{ a = Add(x, three) c = Clip(a, half, six) m = Mul(x, c) y = Div(m, six) }",
    "no upper bound": "{ a = Add(x, three) c = Clip(a, zero) m = Mul(x, c) y = Div(m, six) }",
    "a square": "{ a = Add(x, three) c = Clip(a, zero, six) m = Mul(c, c) y = Div(m, six) }",
    "divided by the sigmoid": "{ a = Add(x, three) c = Clip(a, half, six) y = Div(six, c) }",
    "a second reader": """{
        a = Add(x, three) c = Clip(a, zero, six) m = Mul(x, c) d = Div(m, six) y = Add(d, c)
    }""",
    "a sum that is read": """{
        a = Add(x, three) c = Clip(a, zero, six) m = Mul(x, c) d = Div(m, six) y = Add(d, a)
    }""",
}


def model_of(text: str) -> ir.Model:
    named = {
        n: np.float32(v) for n, v in NUMBERS.items() if any(f"{n}{end}" in text for end in ",)")
    }
    return normalized(sketch(f"{HEAD} {text}", named))


def run(model: ir.Model) -> np.ndarray:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    return open_session(proto.SerializeToString()).run(None, {"x": X})[0]


@pytest.mark.parametrize("name", FUSED)
def test_a_hard_sigmoid_becomes_one_operator_that_computes_the_same(name: str) -> None:
    model = model_of(FUSED[name])
    before = run(model)

    fuse_hard_sigmoid(model)

    operators = [n.op_type for n in model.graph]
    assert operators.count("HardSigmoid") == 1
    assert not {"Clip", "Add", "Div"} & set(operators)
    np.testing.assert_allclose(run(model), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", KEPT)
def test_what_only_looks_like_a_hard_sigmoid_stays(name: str) -> None:
    model = model_of(KEPT[name])
    before = [n.op_type for n in model.graph]

    fuse_hard_sigmoid(model)

    assert [n.op_type for n in model.graph] == before

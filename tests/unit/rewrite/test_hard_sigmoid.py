"""Hard sigmoids that are spelled out."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from quant_core.model.session import open_session, run
from quant_core.rewrite.hard_sigmoid import spell_out_hard_sigmoid
from tests.models import random_feed, sketch


@pytest.mark.parametrize("attributes", ["", "<alpha = 0.16666667, beta = 0.5>", "<beta = -1.5>"])
def test_a_spelled_out_hard_sigmoid_computes_the_same(attributes):
    text = f"(float[2, 3] x) => (float[2, 3] y) {{ h = HardSigmoid{attributes}(x) y = Mul(x, h) }}"
    original = sketch(text)
    model = ir.from_proto(original)

    spell_out_hard_sigmoid(model)

    assert [node.op_type for node in model.graph] == ["Add", "Clip", "Mul", "Mul"]
    feed = {"x": 10 * random_feed(original, 0)["x"]}
    there, here = (run(open_session(m), feed)[0] for m in (model, original.SerializeToString()))
    np.testing.assert_allclose(there, here, rtol=1e-5, atol=1e-6)


def test_one_that_falls_is_left():
    text = "(float[2, 3] x) => (float[2, 3] y) { y = HardSigmoid<alpha = -0.2>(x) }"
    model = ir.from_proto(sketch(text))

    spell_out_hard_sigmoid(model)

    assert [node.op_type for node in model.graph] == ["HardSigmoid"]

"""The normal form of a graph computes the same, with less to carry."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from quant_core.model.normalize import normalize
from quant_core.model.session import open_session, run
from tests.models import sketch

X = np.random.default_rng(0).standard_normal((2, 4), dtype=np.float32)
LOOP = """(float[2,4] x, float[4,4] w) => ({outputs}) {{
    k = Add(w, w)
    {results} = Loop <body = body (int64 i, bool go, float[2,4] s, float[4,4] v)
        => (bool go_, float[2,4] s_, float[4,4] v_{each}) {{
        go_ = Identity(go) p = MatMul(s, v) s_ = Tanh(p) v_ = Identity(v)
    }}> (steps, , x, k)
    {rest}
}}"""


@pytest.mark.parametrize(
    ("values", "states"),
    [
        ({"outputs": "float[2,4] y", "results": "y, last", "each": "", "rest": ""}, 1),
        (
            {
                "outputs": "float[2,4] z",
                "results": "y, last",
                "each": "",
                "rest": "z = MatMul(y, last)",
            },
            1,
        ),
        (
            {
                "outputs": "float[2,4] y, float[4,4] last",
                "results": "y, last",
                "each": "",
                "rest": "",
            },
            2,
        ),
        (
            {
                "outputs": "float[2,4] y, float[3,4,4] all",
                "results": "y, last, all",
                "each": ", float[4,4] v_",
                "rest": "",
            },
            2,
        ),
    ],
    ids=["unread", "read afterwards", "an output", "collected"],
)
def test_a_loop_does_not_carry_what_it_never_changes(values, states):
    model = ir.from_proto(sketch(LOOP.format(**values), {"steps": np.array(3)}))
    feed = {"x": X, "w": np.eye(4, dtype=np.float32) / 3}
    before = run(open_session(model), feed)

    normalize(model)

    (loop,) = (node for node in model.graph if node.op_type == "Loop")
    (product,) = (n for n in loop.attributes["body"].as_graph() if n.op_type == "MatMul")
    assert len(loop.inputs) == 2 + states
    assert product.inputs[1].producer().op_type == "Add"
    for a, b in zip(before, run(open_session(model), feed), strict=True):
        np.testing.assert_array_equal(a, b)

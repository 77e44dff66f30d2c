"""Edits of a graph leave nothing behind."""

import numpy as np
import onnx_ir as ir

from quant_core.model.graph import drop_unused
from tests.models import sketch


def test_what_only_a_dropped_branch_reads_is_dropped_too():
    weight = np.ones((4, 4), np.float32)
    text = """(float[n, 4] x, bool p) => (float[n, 4] y) {
        y = Relu(x)
        a = MatMul(x, w)
        b = MatMul(a, w)
        unread = If(p) <
            then_branch = g1 () => (float[n, 4] u) {
                u = If(p) <
                    then_branch = g3 () => (float[n, 4] s) { s = Relu(b) },
                    else_branch = g4 () => (float[n, 4] t) { t = Neg(a) } > },
            else_branch = g2 () => (float[n, 4] v) { v = Neg(b) } > }"""
    model = ir.from_proto(sketch(text, {"w": weight}))

    drop_unused(model)

    assert [node.op_type for node in model.graph] == ["Relu"]
    assert not model.graph.initializers

"""What is known of tensors is inferred from sizes of inputs that are sizes."""

from __future__ import annotations

import onnx_ir as ir

from quant_core.optimize.facts import Facts
from tests.models import sketch


def test_a_size_of_minus_1_is_an_open_one():
    """Halved and halved again, -1 would become 1."""
    model = ir.from_proto(
        sketch(
            """(float[n, 3, 48, w] x) => (float y)
               { p = AveragePool<kernel_shape = [3, 2], strides = [3, 2]>(x)
                 y = AveragePool<kernel_shape = [16, 2], strides = [16, 2]>(p) }""",
            {},
        )
    )
    model.graph.inputs[0].shape = ir.Shape([-1, 3, 48, -1])

    facts = Facts.of(model)

    assert facts.shape(model.graph.inputs[0]) == (None, 3, 48, None)
    assert facts.shape(model.graph.outputs[0]) == (None, 3, 1, None)

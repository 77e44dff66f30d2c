"""Whatever a graph is made of, its optimized form computes the same and looks the same outside."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st

from quant_core.errors import ModelError
from quant_core.model.normalize import normalize
from quant_core.model.session import open_session, run
from quant_core.optimize.run import follow, optimize
from tests.laws.sketches import sketches
from tests.unit.optimize.checked import interface_of

MOVERS = frozenset({"Gather", "Slice", "Squeeze"})


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(sketches(), st.booleans())
def test_an_optimized_model_computes_the_same(sketch, timed):
    proto, feed = sketch
    onnx.checker.check_model(proto)
    model = ir.from_proto(proto)
    normalize(model)
    try:
        expected = run(open_session(model), feed)
    except ModelError:
        reject()  # onnxruntime 1.32 loses a Conv that is an output, if its twin is added to it

    found = optimize(model, speedup=(lambda before, after: 2.0) if timed else None)

    got = run(open_session(found.model), feed)
    largest = max(float(np.abs(x).max(initial=0)) for x in (*expected, *feed.values()))
    for a, b in zip(expected, got, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * max(largest, 1))
    assert interface_of(found.model) == interface_of(model)
    if not timed:
        assert _computing(found.model) <= _computing(model)
    again = follow(model, found.applied)
    assert ir.to_proto(again) == ir.to_proto(found.model)


def _computing(model: ir.Model) -> int:
    """How many nodes do more than move numbers."""
    return sum(node.op_type not in MOVERS for node in model.graph)

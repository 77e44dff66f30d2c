"""A model before and after a rule: same outputs, and which operators it is made of then."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from quant_core.model.normalize import normalize
from quant_core.model.session import open_session, run
from quant_core.model.unused import drop_unused
from quant_core.optimize.facts import Facts
from quant_core.optimize.rules import TIMED
from quant_core.optimize.run import Optimized, optimize
from tests.models import random_feed, sketch


def optimized(
    text: str, constants: Mapping[str, np.ndarray], *, timed: str = "", n: int = 2
) -> tuple[Optimized, list[str]]:
    """What becomes of a sketch, once its outputs are found to be the same, and its operators.

    timed  the one rule that is applied, wherever it can be; without it, all that need no clock
    """
    proto = sketch(text, constants)
    feed = random_feed(proto, n=n)
    model = ir.from_proto(proto)
    normalize(model)

    if timed:
        copy = model.clone()
        changes = TIMED[timed](copy, Facts.of(copy), lambda name: True)
        drop_unused(copy)
        found = Optimized(copy, tuple(changes), ())
    else:
        found = optimize(model)

    for a, b in zip(*(run(open_session(m), feed) for m in (model, found.model)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    assert interface_of(found.model) == interface_of(model)
    return found, [node.op_type for node in found.model.graph]


def interface_of(model: ir.Model) -> list[tuple[object, ...]]:
    """Name, type and shape of every input and output."""
    return [(v.name, v.type, v.shape) for v in (*model.graph.inputs, *model.graph.outputs)]

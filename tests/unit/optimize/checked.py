"""A model before and after a rule: same outputs, and which operators it is made of then."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from quant_core.model.normalize import normalize
from quant_core.model.session import open_session, run
from quant_core.optimize.run import Optimized, optimize
from tests.models import random_feed, sketch


def optimized(
    text: str, constants: Mapping[str, np.ndarray], *, timed: bool = False, n: int = 2
) -> tuple[Optimized, list[str]]:
    """What becomes of a sketch, once its outputs are found to be the same, and its operators.

    timed  rules that must be measured are taken to be faster
    """
    proto = sketch(text, constants)
    feed = random_feed(proto, n=n)
    model = ir.from_proto(proto)
    normalize(model)

    found = optimize(model, speedup=(lambda before, after: 2.0) if timed else None)

    for a, b in zip(*(run(open_session(m), feed) for m in (model, found.model)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    return found, [node.op_type for node in found.model.graph]

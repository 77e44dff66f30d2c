"""Bounds of a Clip that a converter or a rewrite wrote with an axis are bounds all the same."""

from __future__ import annotations

import numpy as np

from quant_core.config import QuantConfig
from quant_core.plan.flat_ends import flat_ends
from quant_core.plan.make import make_plan
from quant_core.plan.targets import TARGETS
from tests.models import normalized, sketch
from tests.oracle.cases import weights


def test_a_clip_at_zero_may_have_bounds_with_an_axis():
    text = """(float[n,4,8,8] x) => (float[n,4,8,8] y)
        { c = Conv(x, w) r = Clip(c, lo) y = Conv(r, w) }"""
    model = normalized(sketch(text, weights(w=(4, 4, 1, 1)) | {"lo": np.zeros(1, np.float32)}))
    clipped = next(n for n in model.graph if n.op_type == "Clip")

    plan = make_plan(model, QuantConfig(mode="static"), TARGETS["x86"])

    assert "r" in plan.activations
    assert flat_ends(clipped.inputs[0])[0] == 0.0

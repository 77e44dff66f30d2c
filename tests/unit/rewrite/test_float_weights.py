"""Weights of nodes that compute in float are rounded alike, in whichever form they are stored."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from quant_core.calibrate.observe import observe
from quant_core.config import QuantConfig
from quant_core.model.prepare import prepare
from quant_core.model.session import open_session, run
from quant_core.plan.make import make_plan
from quant_core.plan.targets import TARGETS
from quant_core.rewrite.apply import apply_plan
from tests.models import sketch

RNG = np.random.default_rng(0)


def conv_and_product(folder):
    """A Conv and a Gemm whose weights have long tails, and whose inputs have a mean."""
    text = """(float[1,4,9,9] x) => (float[1,8] y) {
        a = Conv(x, w, b) r = Relu(a) p = GlobalAveragePool(r) f = Flatten(p) y = Gemm(f, v, c)
    }"""
    tailed = {"w": RNG.standard_t(2, (16, 4, 3, 3)), "v": RNG.standard_t(2, (16, 8))}
    biases = {"b": RNG.normal(size=16), "c": RNG.normal(size=8)}
    constants = {name: x.astype(np.float32) for name, x in (tailed | biases).items()}
    path = folder / "model.onnx"
    onnx.save(sketch(text, constants), path)
    return path


@pytest.mark.parametrize("per_channel", [True, False])
def test_the_standard_form_holds_the_weights_and_biases_that_the_folded_form_does(
    tmp_path, per_channel
):
    path = conv_and_product(tmp_path)
    feeds = [{"x": RNG.normal(1, 1, (1, 4, 9, 9)).astype(np.float32)} for _ in range(4)]
    model = prepare(path, feeds)
    outputs = {}

    for runtime in ("folded", "qdq"):
        config = QuantConfig(mode="weight_only", runtime=runtime, per_channel=per_channel)
        plan = make_plan(model, config, TARGETS["x86"])
        # optimized, onnxruntime multiplies by what is behind DequantizeLinear in another way
        made = apply_plan(model, plan, observe(model, plan, feeds)).model
        (outputs[runtime],) = run(open_session(made, optimize=False), feeds[0])

    (exact,) = run(open_session(path), feeds[0])
    assert np.abs(outputs["folded"] - exact).max() > 1e-3
    np.testing.assert_allclose(outputs["qdq"], outputs["folded"], rtol=1e-5, atol=1e-5)

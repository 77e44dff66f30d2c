"""What is known of a model, and made of it once, holds for all candidates, and scaled channels."""

from __future__ import annotations

import numpy as np

from quant_core.calibrate.observe import observe
from quant_core.config import QuantConfig
from quant_core.data.inputs import input_specs
from quant_core.data.samples import open_samples
from quant_core.data.spec import SampleSpec
from quant_core.deadline import NO_DEADLINE
from quant_core.plan.make import make_plan
from quant_core.plan.targets import TARGETS
from quant_core.rewrite.rounding import Rounding
from quant_core.search.calibrated import CalibratedModel
from tests.models import normalized, sketch
from tests.oracle.cases import weights


def test_what_a_candidate_takes_is_what_the_next_one_takes_too(monkeypatch) -> None:
    """Weights are rounded once: each rounding moves the clock by ten seconds, and nothing else."""
    model = normalized(
        sketch("(float[n,8] x) => (float[n,8] y) { y = MatMul(x, w) }", weights(w=(8, 8)))
    )
    plan = make_plan(model, QuantConfig(min_elements=0, mode="dynamic"), TARGETS["x86"])
    calibrated = CalibratedModel(model)
    now, rounded = 0.0, Rounding._round

    def slow(*arguments, **named):
        nonlocal now
        now += 10
        return rounded(*arguments, **named)

    monkeypatch.setattr(Rounding, "_round", slow)
    monkeypatch.setattr("quant_core.rewrite.rounding.time.monotonic", lambda: now)

    candidates = [calibrated.build(plan, label) for label in ("first", "second")]

    assert [candidate.seconds for candidate in candidates] == [0, 0]
    assert calibrated.weights.seconds == now == 10


def test_equalizing_measures_and_rounds_only_what_it_scales() -> None:
    arrays = weights(u=(8, 8, 1, 1), v=(8, 8, 1, 1), w=(8, 8, 1, 1))
    arrays["u"] *= np.geomspace(1, 30, 8, dtype=np.float32)[:, None, None, None]
    text = "a = Conv(x, u) r = Relu(a) b = Conv(r, v) s = Sigmoid(b) y = Conv(s, w)"
    proto = sketch(f"(float[n,8,4,4] x) => (float[n,8,4,4] y) {{ {text} }}", arrays)
    source, model = proto.SerializeToString(), normalized(proto)
    plan = make_plan(model, QuantConfig(min_elements=0), TARGETS["x86"])
    x = np.random.default_rng(0).standard_normal((8, 8, 4, 4), dtype=np.float32)
    samples = open_samples(SampleSpec({"x": x}), input_specs(source))
    calibrated = CalibratedModel(model, samples, observe(source, plan, samples))
    calibrated = calibrated.with_gram_matrices(plan)
    before = calibrated.build(plan, "before")
    rounded_before = len(calibrated.weights.rounded)

    equalized = calibrated.equalized(plan, NO_DEADLINE)

    assert equalized is not None
    anew = observe(equalized.model, plan, samples)
    assert equalized.stats.tensors["r"] == anew.tensors["r"] != calibrated.stats.tensors["r"]
    assert equalized.stats.means["r", 1] == anew.means["r", 1]
    for tensor in ("x", "b", "s", "y"):
        assert equalized.stats.tensors[tensor] is calibrated.stats.tensors[tensor]
    after = equalized.build(plan, "after")
    assert len(calibrated.weights.rounded) == rounded_before + 2  # u and v
    assert after.quantized.model is not before.quantized.model

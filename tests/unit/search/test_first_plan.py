"""The plan that calibration covers, where there are samples, none, or nothing to gain."""

from pathlib import Path

import numpy as np
import onnx
import pytest

from quant_core.api import quantize_model
from quant_core.config import Contract, QuantConfig
from quant_core.evaluate.kernels import Arithmetic, Kernel
from quant_core.search import possible_gain
from quant_core.search.first_plan import UNMEASURED, first_plan
from quant_core.search.policy import POLICY
from tests.models import normalized, sketch
from tests.oracle.cases import weights


@pytest.mark.parametrize("bits", [8, 4])
def test_without_samples_a_conv_says_that_its_kernel_needs_them(bits):
    text = "(float[n,8,6,6] x) => (float[n,64,6,6] y) { a = Conv(x, u) y = Conv(a, w) }"
    model = normalized(sketch(text, weights(u=(64, 8, 1, 1), w=(64, 64, 1, 1))))

    plan = first_plan(model, QuantConfig(bits=bits), measured=False)

    assert all(node.reason.startswith(UNMEASURED) for node in plan.nodes)


SLOW, QUICK, GAINING = (1.0, 99.0), (0.01, 0.99), (1.0, 1.0)


@pytest.fixture(params=[SLOW])
def product(tmp_path, monkeypatch, request) -> Path:
    """A model with a product, which takes so many milliseconds, and all else so many."""
    own_ms, others_ms = request.param
    own = Kernel("l", "MatMul", Arithmetic.FLOAT32, own_ms, covers=("l", "y"))
    others = Kernel("f", "STFT", Arithmetic.FLOAT32, others_ms, covers=("f",))
    monkeypatch.setattr(possible_gain, "profile_kernels", lambda *_, **__: [own, others])
    monkeypatch.setattr(possible_gain, "QUICK_MS", 0.0)
    text = "(float[1,8] x) => (float[1,4] y) { y = MatMul(x, w) }"
    path = tmp_path / "m.onnx"
    onnx.save(sketch(text, weights(w=(8, 4))), path)
    return path


def rows(count: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, 8), dtype=np.float32)


@pytest.mark.parametrize(
    ("product", "count", "ran"),
    [(SLOW, 31, 31), (SLOW, 64, POLICY.rounding_samples), (QUICK, 64, 64)],
    indirect=["product"],
)
def test_where_integers_cannot_gain_few_samples_are_run_to_store_weights(product, count, ran):
    doing: list[str] = []

    made = quantize_model(
        product,
        product.with_name("a.onnx"),
        calibration=rows(count),
        progress=lambda what, _=None: doing.append(what),
    )
    again = quantize_model(
        product, product.with_name("b.onnx"), plan=made.plan, calibration=rows(count)
    )

    assert [trial["candidate"] for trial in made.trace] == ["weight-only"]
    assert any(what.startswith(f"calibrating on {ran} samples") for what in doing)
    rounded = made.plan.rounding_samples
    assert (f"weights are only stored, rounded for {rounded} samples" in made.note) == (
        rounded < count
    )
    assert "the time budget was short" not in made.note
    assert Path(made.output).read_bytes() == Path(again.output).read_bytes()


@pytest.mark.parametrize(
    ("product", "given"),
    [
        (SLOW, {"contract": Contract("sqnr", min=1.0)}),
        (SLOW, {"whole_front": True}),
        (GAINING, {}),
    ],
    indirect=["product"],
)
def test_where_they_may_gain_or_more_than_speed_is_asked_for_integers_are_tried(product, given):
    made = quantize_model(product, product.with_name("a.onnx"), calibration=rows(64), **given)

    assert len(made.trace) > 1
    assert not made.plan.rounding_samples


@pytest.mark.parametrize(
    ("product", "gains"), [(SLOW, False), (GAINING, True)], indirect=["product"]
)
def test_without_samples_too_integers_are_tried_where_they_may_gain(product, gains):
    made = quantize_model(product, product.with_name("a.onnx"))

    tried = [trial["candidate"] for trial in made.trace]
    assert (tried != ["weight-only"]) == gains

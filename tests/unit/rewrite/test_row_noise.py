"""A rounded weight is judged by the noise in its outputs, for the inputs that calibration saw."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from quant_core.calibrate.gram import gram_matrices
from quant_core.calibrate.matmul_inputs import matmul_inputs
from quant_core.calibrate.observe import observe
from quant_core.config import QuantConfig
from quant_core.model.session import open_session
from quant_core.plan.make import make_plan
from quant_core.plan.targets import TARGETS
from quant_core.rewrite.apply import Quantized, apply_plan
from tests.models import normalized, sketch

TEXT = "(float[n,64] x) => (float[n,16] y) { y = MatMul(x, w) }"


def correlated(rng: np.random.Generator) -> np.ndarray:
    """Inputs that are nearly multiples of one vector."""
    return rng.standard_normal((200, 1)) + 0.1 * rng.standard_normal((200, 64))


def half_absent(rng: np.random.Generator) -> np.ndarray:
    """Inputs of which the first half is always 0."""
    return rng.standard_normal((200, 64)) * (np.arange(64) >= 32)


def rounded(w: np.ndarray, x: np.ndarray, bits: int) -> tuple[Quantized, np.ndarray]:
    """What 4 or 8 bits with GPTQ make of the weight, and the outputs for x."""
    proto = sketch(TEXT, {"w": w})
    model, feeds = normalized(proto), [{"x": x}]
    config = QuantConfig(bits=bits, mode="weight_only", layer_bits={"*": bits})
    plan = make_plan(model, config, TARGETS["x86"])
    grams = gram_matrices(proto.SerializeToString(), matmul_inputs(model, plan), feeds)
    stats = replace(observe(proto.SerializeToString(), plan, feeds), gram_matrices=grams)
    made = apply_plan(model, plan, stats)
    return made, open_session(made.model).run(None, {"x": x})[0]


@pytest.mark.parametrize("inputs", [correlated, half_absent])
def test_the_noise_of_the_worst_row_is_that_of_its_output(inputs):
    rng = np.random.default_rng(0)
    w = rng.standard_normal((64, 16)).astype(np.float32)
    x = inputs(rng).astype(np.float32)

    made, found = rounded(w, x, 4)

    exact = x.astype(np.float64) @ w
    of_rows_db = 10 * np.log10(np.square(exact).sum(0) / np.square(exact - found).sum(0))
    # H is damped where rows are judged, so that a few samples do not make them look better
    assert of_rows_db.min() - 3 < made.worst_row_db["y"] < of_rows_db.min() + 0.1

"""Bias correction in onnxruntime: each channel has the mean output of the float model."""

from __future__ import annotations

import numpy as np
import pytest

from tests.models import sketch
from tests.oracle.cases import weights
from tests.oracle.quantizing import Prepared, make, prepare_proto


def anchor(text: str, inputs: str, **shapes: tuple[int, ...]) -> Prepared:
    """A model of one anchor, on inputs whose channels have means far from zero."""
    given = prepare_proto(sketch(f"({inputs}) => (float[n,c] y) {{ {text} }}", weights(**shapes)))
    shift = np.arange(1, 9, dtype=np.float32)
    for feed in given.feeds:
        x = feed["x"]
        feed["x"] = x + (shift[:, None, None] if x.ndim == 4 else shift)
    return given


POOLED = "p = GlobalAveragePool(c) y = Flatten(p)"
IMAGE, VECTOR = "float[n,8,5,5] x", "float[n,8] x"
ANCHORS = {
    "conv": lambda: anchor(f"c = Conv(x, w, b) {POOLED}", IMAGE, w=(6, 8, 1, 1), b=(6,)),
    "conv without bias": lambda: anchor(f"c = Conv(x, w) {POOLED}", IMAGE, w=(6, 8, 1, 1)),
    "grouped conv": lambda: anchor(
        f"c = Conv<group = 4>(x, w, b) {POOLED}", IMAGE, w=(4, 2, 1, 1), b=(4,)
    ),
    "gemm": lambda: anchor("y = Gemm(x, w, b)", VECTOR, w=(8, 6), b=(6,)),
    "gemm without bias": lambda: anchor("y = Gemm<transB = 1>(x, w)", VECTOR, w=(6, 8)),
    "gemm with alpha and beta": lambda: anchor(
        "y = Gemm<alpha = 4.0, beta = 0.5>(x, w, b)", VECTOR, w=(8, 6), b=(6,)
    ),
    "gemm with transposed input": lambda: anchor(
        "y = Gemm<transA = 1>(x, w, b)", "float[4,8] x", w=(4, 6), b=(6,)
    ),
    "gemm with one bias for all": lambda: anchor("y = Gemm(x, w, b)", VECTOR, w=(8, 6), b=(1,)),
}


def shifts(given: Prepared, **options: object) -> np.ndarray:
    """How far the mean of each channel is from the float model's."""
    outputs = [
        np.concatenate([o[0] for o in many])
        for many in (given.floats(), make(given, **options).outputs(given.feeds))
    ]
    return np.abs(outputs[0].mean(0, dtype=np.float64) - outputs[1].mean(0, dtype=np.float64))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", ANCHORS)
def test_weight_only_channels_keep_their_means_or_are_left_alone(name, bits):
    given = ANCHORS[name]()

    shifted, kept = (
        shifts(given, mode="weight_only", bits=bits, bias_correction=on) for on in (False, True)
    )

    if name in ("gemm with alpha and beta", "gemm with transposed input"):
        np.testing.assert_array_equal(kept, shifted)
    else:
        assert kept.max() < 1e-4 < shifted.max()


@pytest.mark.parametrize(
    "name", ["conv", "conv without bias", "grouped conv", "gemm", "gemm without bias"]
)
def test_static_channels_do_too_up_to_the_rounding_of_activations(name):
    given = ANCHORS[name]()

    shifted, kept = (shifts(given, mode="static", bias_correction=on).max() for on in (False, True))

    assert kept < shifted / 2

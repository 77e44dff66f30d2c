"""A rounded tensor with several readers: onnxruntime dequantizes it for each, unless they share."""

from __future__ import annotations

import numpy as np
import pytest

from tests.facts.patterns import kernels, pair

NUMBERS = {
    "root": np.array(2**0.5, np.float32),
    "one": np.array(1, np.float32),
    "half": np.array(0.5, np.float32),
}
SILU = "g = Sigmoid(a) y = Mul(a, g)"
GELU = "e = Div(a, root) f = Erf(e) g = Add(f, one) h = Mul(a, g) y = Mul(h, half)"
ACTIVATIONS = {"QuickGelu": SILU, "Gelu": GELU}


def ran(read: str, activation: str) -> list[str]:
    body = pair("x", "d") + f" {read} {activation}"
    used = {name: number for name, number in NUMBERS.items() if name in body}
    return kernels(body, used, borders=True)


@pytest.mark.parametrize("merged", ACTIVATIONS)
def test_readers_of_a_dequantize_get_one_each_and_are_not_merged(merged):
    plain = ACTIVATIONS[merged].replace("(a", "(d")

    found = ran("", plain)

    assert found.count("DequantizeLinear") == 2
    assert merged not in found


@pytest.mark.parametrize("merged", ACTIVATIONS)
def test_readers_of_a_cast_like_behind_it_share_one_and_are_merged(merged):
    found = ran("a = CastLike(d, half)", ACTIVATIONS[merged])

    assert found == ["QuantizeLinear", "DequantizeLinear", "Cast", merged]

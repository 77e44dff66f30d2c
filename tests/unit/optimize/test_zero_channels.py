"""Channels that are the same number everywhere, or that nobody reads, are cut out."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from quant_core.api import quantize, quantize_model
from quant_core.config import QuantConfig
from quant_core.errors import RequestError
from quant_core.model.normalize import normalize
from quant_core.model.session import open_session, run
from quant_core.optimize.run import follow, optimize
from tests.models import random_feed, sketch

RNG = np.random.default_rng(0)
IMAGES = "(float[n, 3, 6, 6] x) => (float[n, 5, a, b] y)"


def weights(**shapes):
    return {n: RNG.standard_normal(s).astype(np.float32) for n, s in shapes.items()}


def pruned(text, constants):
    """The shapes of the constants after pruning, once the outputs are found to be the same."""
    proto = sketch(text, constants)
    model, feed = ir.from_proto(proto), random_feed(proto)
    normalize(model)

    found = optimize(model, rules=["zero_channels"])

    expected, got = (run(open_session(m), feed) for m in (model, found.model))
    for a, b in zip(expected, got, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert ir.to_proto(follow(model, found.applied)) == ir.to_proto(found.model)
    constants = found.model.graph.initializers.items()
    return {name: tuple(value.const_value.shape.numpy()) for name, value in constants}


def test_filters_of_zeros_go_with_what_reads_them():
    given = weights(w=(8, 3, 3, 3), b=(8,), v=(5, 8, 3, 3))
    given["w"][[1, 4]] = 0
    given["b"][[1, 4]] = 0, -1  # which Relu makes 0

    shapes = pruned(
        f"{IMAGES} {{ c = Conv(x, w, b) r = Relu(c) y = Conv<pads = [1, 1, 1, 1]>(r, v) }}", given
    )

    assert shapes == {"w": (6, 3, 3, 3), "b": (6,), "v": (5, 6, 3, 3)}


def test_a_number_goes_into_the_bias_where_the_reader_does_not_pad():
    given = weights(w=(8, 3, 1, 1), b=(8,), v=(5, 8, 3, 3), c=(5,))
    given["w"][2] = 0
    given["b"][2] = 3
    text = f"{IMAGES} {{ h = Conv(x, w, b) r = Tanh(h) y = Conv<pads = [PAD]>(r, v, c) }}"

    assert pruned(text.replace("PAD", "0, 0, 0, 0"), given)["v"] == (5, 7, 3, 3)
    assert pruned(text.replace("PAD", "1, 1, 1, 1"), given)["v"] == (5, 8, 3, 3)


def test_channels_that_nobody_reads_go():
    given = weights(w=(8, 3, 3, 3), v=(5, 8, 1, 1), u=(5, 8, 1, 1))
    given["v"][:, [0, 3]] = 0
    given["u"][:, [3, 5]] = 0

    shapes = pruned(
        f"""{IMAGES} {{ c = Conv(x, w) s = Sigmoid(c) p = Conv(s, v) q = Conv(s, u)
                        y = Add(p, q) }}""",
        given,
    )

    assert shapes == {"w": (7, 3, 3, 3), "v": (5, 7, 1, 1), "u": (5, 7, 1, 1)}


def test_both_ways_of_a_sum_and_a_depthwise_conv_keep_the_same_channels():
    given = weights(w=(6, 3, 1, 1), u=(6, 3, 1, 1), d=(6, 1, 3, 3), e=(6,), s=(6, 1, 1), g=(5, 6))
    given["w"][[0, 1]] = 0
    given["u"][[1, 2]] = 0
    given["e"][1] = 0

    shapes = pruned(
        """(float[n, 3, 6, 6] x) => (float[n, 5] y)
           { a = Conv(x, w) b = Conv(x, u) t = Add(a, b)
             k = Conv<group = 6, pads = [1, 1, 1, 1]>(t, d, e) m = Mul(k, s) r = Relu(m)
             p = GlobalAveragePool(r) f = Flatten(p) y = Gemm<transB = 1>(f, g) }""",
        given,
    )

    assert shapes["w"] == shapes["u"] == (5, 3, 1, 1)
    assert (shapes["d"], shapes["e"], shapes["s"]) == ((5, 1, 3, 3), (5,), (5, 1, 1))
    assert shapes["g"] == (5, 5)


def test_hidden_units_of_products_go():
    given = weights(w=(4, 7), b=(7,), v=(7, 3))
    given["w"][:, 6] = 0
    given["b"][6] = -2

    shapes = pruned(
        """(float[n, t, 4] x) => (float[n, t, 3] y)
           { m = MatMul(x, w) a = Add(m, b) r = Relu(a) y = MatMul(r, v) }""",
        given,
    )

    assert shapes == {"w": (4, 6), "b": (6,), "v": (6, 3)}


@pytest.mark.parametrize(
    "between", ["o = Softmax<axis = 1>(c)", "o = Concat<axis = 1>(c, c)", "o = Transpose(c)"]
)
def test_channels_that_other_operators_see_stay(between):
    given = weights(w=(6, 3, 1, 1), v=(5, 12 if "Concat" in between else 6, 1, 1))
    given["w"][0] = 0

    shapes = pruned(f"{IMAGES} {{ c = Conv(x, w) {between} y = Conv(o, v) }}", given)

    assert shapes["w"] == (6, 3, 1, 1)


def test_outputs_keep_their_channels_and_one_channel_stays():
    given = weights(w=(4, 3, 1, 1), v=(5, 4, 1, 1))
    given["w"][:] = 0
    given["v"][0] = 0

    shapes = pruned(f"{IMAGES} {{ c = Conv(x, w) y = Conv(c, v) }}", given)

    assert shapes == {"w": (1, 3, 1, 1), "v": (5, 1, 1, 1)}


def test_a_config_asks_for_it_and_the_plan_can_be_replayed(tmp_path):
    given = weights(w=(32, 3, 3, 3), b=(32,), v=(5, 32, 3, 3))
    given["w"][:16] = given["b"][:16] = 0
    path, output = tmp_path / "m.onnx", tmp_path / "q.onnx"
    onnx.save(sketch(f"{IMAGES} {{ c = Conv(x, w, b) r = Relu(c) y = Conv(r, v) }}", given), path)

    whole = quantize(path, tmp_path / "whole.onnx")
    made = quantize(path, output, prune="zero-channels")
    again = quantize_model(path, tmp_path / "again.onnx", plan=made.plan)

    assert Path(again.output).read_bytes() == output.read_bytes()
    assert made.size_bytes < 0.7 * whole.size_bytes
    assert "zero_channels" in {change.rule for change in made.plan.rewrites}
    assert made.worst_db > 30
    with pytest.raises(RequestError, match="prune"):
        QuantConfig(prune="channels")

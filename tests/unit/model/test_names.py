"""What the optimizer made is not mixed up with what it makes when the model is loaded."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from quant_core.api import quantize_model
from quant_core.config import QuantConfig
from quant_core.model.prepare import prepare
from quant_core.model.session import open_session, run
from tests.models import sketch

# Two biases are added in Gemms before onnxruntime looks for attention, and the others behind it.
ATTENTION = """(float[1,4,8] x) => (float[1,4,8] y) {
    a = LayerNormalization(x, one)
    q = MatMul(a, wq)  qb = Add(q, b)  qr = Reshape(qb, heads)  qt = Transpose<perm=[0,2,1,3]>(qr)
    k = MatMul(a, wk)  kb = Add(k, b)  kr = Reshape(kb, heads)  kt = Transpose<perm=[0,2,3,1]>(kr)
    v = MatMul(a, wv)  vb = Add(v, b)  vr = Reshape(vb, heads)  vt = Transpose<perm=[0,2,1,3]>(vr)
    l = MatMul(qt, kt)  p = Softmax<axis=3>(l)  o = MatMul(p, vt)
    ot = Transpose<perm=[0,2,1,3]>(o)  or = Reshape(ot, flat)
    m = MatMul(or, wo)  mb = Add(m, b)  s = Add(mb, a)
    n = LayerNormalization(s, one)
    f = MatMul(n, w)  fb = Add(f, b)  y = Relu(fb)
}"""
# A decoder whose inputs and outputs onnxruntime knows by their names, which the main graph has too.
SEARCH = """(int32[n,s] input_ids) => (int32[n,m] sequences) {
    sequences = com.microsoft.GreedySearch<
        eos_token_id = 63, pad_token_id = 63, model_type = 0, decoder = step (
            int32[n,s] input_ids, int32[n,s] position_ids, int32[n,t] attention_mask,
            float[2,n,2,p,32] past_0
        ) => (float[n,s,64] logits, float[2,n,2,t,32] present_0) {
            x = Gather(table, input_ids)
            xs = Reshape(x, heads) u = Unsqueeze(xs, first) kv = Expand(u, two)
            new = Transpose<perm = [0,1,3,2,4]>(kv)
            present_0 = Concat<axis = 3>(past_0, new)
            logits = MatMul(x, w)
        }>(input_ids, longest)
}"""


@pytest.fixture
def attention(tmp_path):
    rng = np.random.default_rng(0)
    weights = {name: rng.normal(size=(8, 8)).astype(np.float32) for name in ("wq", "wk", "wv")}
    weights |= {name: rng.normal(size=(8, 8)).astype(np.float32) for name in ("wo", "w")}
    weights |= {"b": rng.normal(size=8).astype(np.float32), "one": np.ones(8, np.float32)}
    shapes = {"heads": np.array([0, 0, 2, 4]), "flat": np.array([0, 0, 8])}
    onnx.save(sketch(ATTENTION, weights | shapes), tmp_path / "attention.onnx")
    return tmp_path / "attention.onnx"


def test_a_prepared_model_loads_where_onnxruntime_goes_on_with_what_it_began(attention):
    open_session(prepare(attention))


@pytest.mark.parametrize("bits", [8, 4])
def test_what_is_made_of_it_loads_and_may_be_quantized_again(attention, tmp_path, bits):
    for made in (tmp_path / "made.onnx", tmp_path / "again.onnx"):
        quantize_model(attention, made, QuantConfig(bits=bits, optimize=False))
        open_session(made)
        attention = made


@pytest.mark.parametrize("mode", ["auto", "weight_only"])
def test_inner_graphs_that_onnxruntime_knows_by_names_keep_them(tmp_path, mode):
    path, output = tmp_path / "search.onnx", tmp_path / "made.onnx"
    rng = np.random.default_rng(0)
    constants = {
        "table": rng.normal(size=(64, 64)).astype(np.float32),
        "w": rng.normal(size=(64, 64)).astype(np.float32),
        "longest": np.array([9], np.int32),
        "heads": np.array([0, 0, 2, 32]),
        "first": np.array([0]),
        "two": np.array([2, 1, 1, 1, 1]),
    }
    onnx.save(sketch(SEARCH, constants), path)
    feed = {"input_ids": np.array([[3, 1, 4]], np.int32)}

    quantize_model(path, output, QuantConfig(mode=mode), calibration=[feed])

    [exact], [found] = (run(open_session(model), feed) for model in (path, output))
    assert np.array_equal(exact, found)
    assert output.stat().st_size < 0.6 * path.stat().st_size

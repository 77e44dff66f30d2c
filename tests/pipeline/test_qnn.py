"""A file for the target qnn in Qualcomm's emulation of its HTP."""

from __future__ import annotations

import onnx
import pytest

from quant_core.model.session import open_session, run
from tests.models import random_feed, sketch
from tests.oracle.cases import weights
from tests.oracle.quantizing import make, prepare_proto, sqnr_db
from tests.qnn import run_in_qnn

CNN = """(float[n, 8, 12, 12] x) => (float[n, 5] y) {
    a = Conv<pads = [1, 1, 1, 1]>(x, u) s = Sigmoid(a)
    b = Conv<group = 8>(s, v) t = Tanh(b) p = MaxPool<kernel_shape = [2, 2]>(t)
    g = GlobalAveragePool(p) f = Flatten(g) y = Gemm(f, w)
}"""
PRODUCTS = """(float[n, 8] x) => (float[n, 5] y) {
    a = MatMul(x, u) r = Relu(a) y = MatMul(r, v)
}"""
NEAR_DB = 35.0  # weights in 8 bits, and sigmoids of the chip that are not exact
MODELS = {
    "cnn": (CNN, {"u": (8, 8, 3, 3), "v": (8, 1, 3, 3), "w": (8, 5)}),
    "products": (PRODUCTS, {"u": (8, 16), "v": (16, 5)}),
}


@pytest.mark.slow
@pytest.mark.parametrize(("text", "shapes"), MODELS.values(), ids=MODELS)
def test_all_of_a_file_for_qnn_runs_there_and_is_right(text, shapes, tmp_path):
    pytest.importorskip("onnxruntime_qnn", reason="onnxruntime-qnn is not installed")
    proto = sketch(text, weights(**shapes))
    path = tmp_path / "made.onnx"
    onnx.save(make(prepare_proto(proto), "qnn").model, path)
    feed = random_feed(proto)

    there, elsewhere = run_in_qnn(path, feed)

    assert not elsewhere
    wanted = run(open_session(proto.SerializeToString()), feed)
    assert sqnr_db([wanted], [there]) > NEAR_DB

"""A large table stays in integers when the model is loaded, a small one becomes float."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from quant_core.api import quantize_model
from quant_core.config import QuantConfig
from quant_core.model.session import open_session, optimized_graph, run
from quant_core.numerics.sqnr import sqnr_db
from quant_core.rewrite.tables import SMALL_TABLE
from tests.models import sketch

WIDTH = 32
TEXT = """(int64[n] i, int64[n] j) => (float[n,32] y) {
    a = Gather(t, i) b = Gather(t, j) y = Add(a, b) }"""


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("is_small", [True, False])
def test_rows_of_a_small_table_need_no_more_work(tmp_path, bits, is_small):
    rows = SMALL_TABLE // WIDTH + (not is_small)
    table = np.random.default_rng(0).standard_normal((rows, WIDTH), dtype=np.float32)
    onnx.save(sketch(TEXT, {"t": table}), tmp_path / "m.onnx")
    feed = {"i": np.array([0, 5, rows - 1]), "j": np.array([1, 5, 2])}
    config = QuantConfig(mode="weight_only", bits=bits)

    made = quantize_model(tmp_path / "m.onnx", tmp_path / "q.onnx", config)

    kernels = {node.op_type for node in optimized_graph(tmp_path / "q.onnx").graph.node}
    assert (kernels == {"Gather", "Add"}) == is_small
    assert made.size_bytes < made.float_size_bytes * (0.3 if bits == 8 else 0.2)
    (y,) = run(open_session(tmp_path / "q.onnx"), feed)
    exact = table[feed["i"]] + table[feed["j"]]
    db = sqnr_db(np.square(exact).sum(), np.square(y - exact).sum())
    assert db > (35 if bits == 8 else 15)

"""A float node between integers: onnxruntime rounds it in the plain form, and not in ours."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import onnx_ir as ir
import pytest

from quant_core.model.session import open_session, optimized_graph, run
from quant_core.rewrite.float_islands import keep_in_float
from tests.models import normalized, sketch

RNG = np.random.default_rng(0)
ISLANDS = {
    "Conv": "r = Conv<pads = [1, 1, 1, 1]>(xd, w, b)",
    "Conv and Relu": "c = Conv<pads = [1, 1, 1, 1]>(xd, w, b) r = Relu(c)",
    "ConvTranspose": "r = ConvTranspose<pads = [1, 1, 1, 1]>(xd, w, b)",
    "Gemm": "f = Flatten(xd) r = Gemm(f, g)",
    "Gemm and Relu": "f = Flatten(xd) c = Gemm(f, g) r = Relu(c)",
}


def island(body: str) -> ir.Model:
    """x quantized, one float node whose channels differ a hundredfold, its output quantized."""
    is_gemm = "Gemm" in body
    data = "xq = QuantizeLinear(x, s, z) xd = DequantizeLinear(xq, s, z)"
    if is_gemm:
        data, body = (
            "f0 = Flatten(x) fq = QuantizeLinear(f0, s, z)",
            body.removeprefix("f = Flatten(xd) "),
        )
        body = f"f = DequantizeLinear(fq, s, z) {body}"
    text = f"""(float[n,8,6,6] x) => (float y) {{
        {data} {body} q = QuantizeLinear(r, t, z) y = DequantizeLinear(q, t, z)
    }}"""
    sizes = np.logspace(-2, 0, 8, dtype=np.float32)
    constants = {
        "s": np.float32(0.03),
        "t": np.float32(0.1),
        "z": np.uint8(128),
        "w": RNG.standard_normal((8, 8, 3, 3), dtype=np.float32) * sizes[:, None, None, None],
        "b": np.zeros(8, np.float32),
        "g": RNG.standard_normal((288, 8), dtype=np.float32) * sizes / 10,
    }
    used = {
        name: array for name, array in constants.items() if f"{name})" in text or f"{name}," in text
    }
    return normalized(sketch(text, used))


def integers_loaded(model: ir.Model) -> bool:
    """Whether the weight of the one node is integers once onnxruntime has loaded the model."""
    loaded = optimized_graph(ir.to_proto(model).SerializeToString()).graph
    quantizing = [n for n in loaded.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    return len(quantizing) != 4


@pytest.mark.parametrize("body", ISLANDS.values(), ids=ISLANDS)
def test_the_plain_form_is_taken(body):
    assert integers_loaded(island(body))


@pytest.mark.parametrize("is_onnxruntime", [True, False])
@pytest.mark.parametrize("body", ISLANDS.values(), ids=ISLANDS)
def test_ours_stays_float_and_computes_what_the_graph_says(body, is_onnxruntime):
    model = island(body)
    x = {"x": RNG.standard_normal((4, 8, 6, 6), dtype=np.float32)}
    exact = run(open_session(model, optimize=False), x)[0]

    keep_in_float(model, is_onnxruntime=is_onnxruntime)
    model.graph.opset_imports.setdefault("com.microsoft", 1)

    assert not integers_loaded(model)
    steps = np.abs(run(open_session(model), x)[0] - exact) / 0.1
    assert steps.max() <= 1.01  # sums in another order may round to the next step
    assert np.mean(steps > 0.5) < 0.01


def test_a_node_whose_weight_is_behind_a_dequantize_linear_is_left_to_fuse():
    text = """(float[n,8,6,6] x) => (float[n,8,4,4] y) {
        xq = QuantizeLinear(x, s, z) xd = DequantizeLinear(xq, s, z) wd = DequantizeLinear(w, s)
        c = Conv(xd, wd) q = QuantizeLinear(c, s, z) y = DequantizeLinear(q, s, z)
    }"""
    weight = RNG.integers(-60, 60, (8, 8, 3, 3)).astype(np.int8)
    model = normalized(sketch(text, {"s": np.float32(0.1), "z": np.uint8(128), "w": weight}))
    before = [n.op_type for n in model.graph]

    keep_in_float(model, is_onnxruntime=True)

    assert [n.op_type for n in model.graph] == before


MOVED = """(float[1,8,4,4] x, bool c, float[3,2,64] e) => (float[2,64] y) {
    q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) t = Transpose<perm=[0,1,3,2]>(d)
    r = Reshape(t, k) y = INNER }"""
# Operators with graphs of their own, which read what was moved behind the integers.
INNER = {
    "If": """If(c) <
        then_branch = a () => (float[2,64] u) { u = Relu(r) },
        else_branch = b () => (float[2,64] v) { v = Tanh(r) }>""",
    "Loop": """Loop(n, c, o) <
        body = a (int64 i, bool b, float[2,64] h) => (bool g, float[2,64] u) {
            g = Identity(b) u = Add(h, r) }>""",
    "Scan": """Scan(o, e) <num_scan_inputs = 1,
        body = a (float[2,64] h, float[2,64] w) => (float[2,64] u) {
            v = Add(h, w) u = Add(v, r) }>""",
}
LOADING = "import sys, onnxruntime; onnxruntime.InferenceSession(sys.argv[1])"


@pytest.mark.parametrize("operator", INNER)
def test_an_inner_graph_that_reads_what_was_moved_behind_integers_ends_the_process(
    tmp_path, operator
):
    """When this fails, rule 3 of float_islands.py can go."""
    constants = {"s": np.float32(0.03), "z": np.uint8(128), "k": np.array([2, 64])}
    constants |= {"n": np.int64(3), "o": np.ones((2, 64), np.float32)}
    model = normalized(sketch(MOVED.replace("INNER", INNER[operator]), constants))
    ir.save(model, tmp_path / "plain.onnx")
    keep_in_float(model, is_onnxruntime=True)
    ir.save(model, tmp_path / "kept.onnx")

    ends = [
        subprocess.run([sys.executable, "-c", LOADING, tmp_path / name], capture_output=True)
        for name in ("plain.onnx", "kept.onnx")
    ]

    assert [end.returncode == 0 for end in ends] == [False, True]

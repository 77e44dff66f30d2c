"""A weight is stored once, as integers, whichever way it takes to where it is multiplied."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from quant_core.api import quantize_model
from quant_core.config import QuantConfig
from quant_core.model import files, graph
from quant_core.model.origins import origins_of
from quant_core.model.prepare import prepare
from quant_core.model.session import open_session, run
from quant_core.numerics.sqnr import sqnr_db
from tests.models import sketch

RNG = np.random.default_rng(0)
D = 96
LOOP = """(float[n,96] x) => (float[n,96] y) { y, last = Loop(rounds, yes, x, w) <body = b (
        int64 i, bool go, float[n,96] s, float[96,96] v
    ) => (bool again, float[n,96] t, float[96,96] u) {
    p = MatMul(s, v) t = Tanh(p) u = Mul(v, half) again = Identity(go)
}> }"""
SCAN = """(float[n,96] x) => (float[n,96] y) { y = Scan <num_scan_inputs = 1, body = b (
    float[n,96] s, float[96,96] v) => (float[n,96] t) { p = MatMul(s, v) t = Tanh(p)
}> (x, stack) }"""
BRANCHES = """(float[n,96] x, bool c) => (float[n,96] y) { y = If(c) <
    then_branch = a () => (float[n,96] r) {
        v = Transpose<perm=[1,0]>(w) m = MatMul(x, v) r = Relu(m) },
    else_branch = b () => (float[n,96] t) {
        v = Transpose<perm=[1,0]>(w) m = MatMul(x, v) t = Tanh(m) }
> }"""
LOOKED_UP = """(float[n,96] x, bool c, int64[k] i) => (float[k,n] y) { y = If(c) <
    then_branch = a () => (float[k,n] r) {
        g = Gather(w, i) t = Transpose<perm=[1,0]>(x) m = MatMul(g, t) r = Relu(m) },
    else_branch = b () => (float[k,n] r) {
        g = Gather(w, i) t = Transpose<perm=[1,0]>(x) m = MatMul(g, t) r = Tanh(m) }
> }"""
TIED = LOOKED_UP.replace("MatMul(g, t)", "MatMul(h, t)").replace(
    "t = Transpose", "h = MatMul(g, w) t = Transpose"
)
COLUMNS = """(float[n,96] x, int64[k] i) => (float[n,k] y) {
    v = Gather<axis=1>(w, i) y = MatMul(x, v) }"""
MASKED = """(float[n,96] x, bool[96,96] m) => (float[n,96] y) {
    v = Where(m, w, zero) y = MatMul(x, v) }"""
CHOSEN = """(float[n,96] x, bool c, bool[96,96] m) => (float[n,96] y) {
    v = If(c) <
        then_branch = a () => (float[96,96] r) { r = Identity(w) },
        else_branch = b () => (float[96,96] r) { r = Where(m, w, zero) }
    > p = MatMul(x, v) y = MatMul(p, w) }"""
JOINED = """(float[n,96] x, float[96,4] a) => (float[n,100] y) {
    v = Concat<axis=1>(w, a) y = MatMul(x, v) }"""
SUMMED = """(float[n,96] x) => (float[n,4,96] y) {
    y = Einsum<equation = "nd,edf->nef">(x, stack) }"""
ADAPTED = """(float[n,96] x, float[k,r] l, float[r,m] t) => (float[n,96] y) {
    p = MatMul(l, t) v = Add(p, w) y = MatMul(x, v) }"""
EXPERTS = """(float[n,96] x, int64[n] e) => (float[n,1,96] y) {
    axis = Constant<value_ints = [1]>() r = Unsqueeze(x, axis)
    v = Gather(stack, e) y = MatMul(r, v) }"""
FUSED = (
    """(float[n,96] x) => (float[n,96] y) { y = com.microsoft.FusedMatMul<alpha = 0.5>(x, w) }"""
)

ROUTED = """(float[n,96] x, float[n,4] r) => (float[n,96] y) {
    y = com.microsoft.MoE<k = 2>(x, r, up, bias, down) }"""

SPELLED = """(float[n,96] x) => (float[1,n,96] y) {
    a = Abs(x) m = Mul(a, fifty) i = Cast<to = 6>(m) one = Constant<value_ints = [0]>()
    j = Unsqueeze(i, one)
    y = com.microsoft.WordConvEmbedding<embedding_size = 96, conv_window_size = 5>(
        j, convs, bias, letters) }"""


def weights(**shapes) -> dict[str, np.ndarray]:
    return {name: RNG.normal(size=s).astype(np.float32) / 10 for name, s in shapes.items()}


ONE = weights(w=(D, D))
STACK = weights(stack=(4, D, D))
ROUNDS = {"rounds": np.array(3), "yes": np.array(True), "half": np.array(0.5, np.float32)}
KINDS = {
    "changed by a Loop": (LOOP, ONE | ROUNDS),
    "input of a Scan": (SCAN, STACK),
    "transposed in two branches": (BRANCHES, ONE),
    "looked up in two branches": (LOOKED_UP, ONE),
    "looked up and multiplied in two branches": (TIED, ONE),
    "columns that are picked": (COLUMNS, ONE),
    "masked": (MASKED, ONE | {"zero": np.array(0, np.float32)}),
    "chosen by an If": (CHOSEN, ONE | {"zero": np.array(0, np.float32)}),
    "joined with an input": (JOINED, ONE),
    "a stack in an Einsum": (SUMMED, STACK),
    "under an adapter whose sizes are open": (ADAPTED, ONE),
    "experts of a stack": (EXPERTS, STACK),
    "an operator of onnxruntime's own": (FUSED, ONE),
    "letters of words": (
        SPELLED,
        weights(convs=(96, 1, 5, 32), bias=(96,), letters=(256, 32)) | {"fifty": np.float32(50)},
    ),
    "experts of one operator": (ROUTED, weights(up=(4, D, D), bias=(4, D), down=(4, D, D))),
}


def feed_of(text: str) -> dict[str, np.ndarray]:
    feed = {"x": RNG.normal(size=(5, D)).astype(np.float32)}
    if "bool c" in text:
        feed["c"] = np.array(True)
    if "int64[k] i" in text:
        feed["i"] = np.arange(0, D, 7)
    if "bool[96,96] m" in text:
        feed["m"] = RNG.random((D, D)) > 0.3
    if "int64[n] e" in text:
        feed["e"] = np.array([3, 0, 2, 2, 1])
    if "float[k,r] l" in text:
        feed |= {"l": RNG.normal(size=(D, 4)), "t": RNG.normal(size=(4, D)) / 20}
    if "float[n,4] r" in text:
        feed["r"] = RNG.normal(size=(5, 4)).astype(np.float32)
    if "float[96,4] a" in text:
        feed["a"] = RNG.normal(size=(D, 4)).astype(np.float32)
    return {n: a.astype(np.float32) if a.dtype == np.float64 else a for n, a in feed.items()}


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_the_file_holds_its_integers_once(tmp_path, kind, bits):
    text, constants = KINDS[kind]
    path, output = tmp_path / "model.onnx", tmp_path / "made.onnx"
    onnx.save(sketch(text, constants), path)
    feed = feed_of(text)

    quantize_model(path, output, QuantConfig(bits=bits, mode="weight_only"))

    (exact, *_), (found, *_) = run(open_session(path), feed), run(open_session(output), feed)
    noise, signal = float(np.square(exact - found).sum()), float(np.square(exact).sum())
    assert sqnr_db(signal, noise) > (32 if bits == 8 else 10)
    weight_bytes = sum(array.nbytes for array in constants.values()) * bits / 32
    assert output.stat().st_size < 1.2 * weight_bytes + 3000


@pytest.mark.parametrize("bits", [8, 4])
def test_branches_may_give_constants_back_as_they_are(tmp_path, bits):
    proto = sketch("""(float[n,96] x, bool c) => (float[n,96] y) {
        v = If(c) <then_branch = a () => (float[96,96] r) { r = Identity(x) },
                   else_branch = b () => (float[96,96] r) { r = Identity(x) }>
        y = MatMul(x, v) }""")
    for attribute, step in zip(proto.graph.node[0].attribute, (1, -1), strict=True):
        del attribute.g.node[:]
        tensor = onnx.numpy_helper.from_array(ONE["w"][::step], "r")
        attribute.g.initializer.append(tensor)
    path, output = tmp_path / "model.onnx", tmp_path / "made.onnx"
    onnx.save(proto, path)

    result = quantize_model(path, output, QuantConfig(bits=bits, mode="weight_only"))

    assert "stays float" not in result.note
    for taken in (True, False):
        feed = feed_of("") | {"c": np.array(taken)}
        (exact,), (found,) = run(open_session(path), feed), run(open_session(output), feed)
        noise, signal = np.square(exact - found).sum(), np.square(exact).sum()
        assert sqnr_db(float(signal), float(noise)) > (32 if bits == 8 else 10)
    assert output.stat().st_size < 1.2 * 2 * D * D * bits / 8 + 3000


def test_equal_weights_of_two_branches_are_one(tmp_path):
    text = BRANCHES.replace("Transpose<perm=[1,0]>(w)", "Identity(w)")
    proto = sketch(text)
    for attribute in proto.graph.node[0].attribute:
        attribute.g.initializer.append(onnx.numpy_helper.from_array(ONE["w"], "w"))
    path, output = tmp_path / "model.onnx", tmp_path / "made.onnx"
    onnx.save(proto, path)

    quantize_model(path, output, QuantConfig())

    assert output.stat().st_size < D * D + 3000


def test_weights_of_one_name_in_two_branches_stay_two(tmp_path):
    proto = sketch(BRANCHES)
    sizes = (1.0, 1e-3)
    for attribute, size in zip(proto.graph.node[0].attribute, sizes, strict=True):
        array = ONE["w"] * np.float32(size)
        attribute.g.initializer.append(onnx.numpy_helper.from_array(array, "w"))
    path, output = tmp_path / "model.onnx", tmp_path / "made.onnx"
    onnx.save(proto, path)

    result = quantize_model(path, output, QuantConfig(exclude=("w",)))

    assert [node.is_rounded for node in result.plan.nodes] == [False, False]
    result = quantize_model(path, output, QuantConfig())
    for taken in (True, False):
        feed = {"x": RNG.normal(size=(5, D)).astype(np.float32), "c": np.array(taken)}
        (exact,), (found,) = run(open_session(path), feed), run(open_session(output), feed)
        assert np.abs(exact - found).max() < 0.03 * np.abs(exact).max()


@pytest.mark.parametrize("glob", ["y", "w", "Identity_w"])
def test_a_carried_weight_is_excluded_by_its_name_and_by_its_readers(tmp_path, glob):
    text, constants = KINDS["changed by a Loop"]
    path = tmp_path / "model.onnx"
    onnx.save(sketch(text, constants), path)
    assert origins_of(prepare(path))["Identity_w"] == ["w", "y"]

    result = quantize_model(path, tmp_path / "made.onnx", QuantConfig(exclude=(glob,)))

    assert [n.reason for n in result.plan.nodes] == [f"excluded by {glob}"]
    assert f"w stays float: excluded by {glob}" in str(result.note)


ADDED = "(float[n,40,96] x) => (float[n,40,96] y) { a = MatMul(x, w) y = Add(a, places) }"


def test_a_table_that_is_only_added_takes_half_the_bytes(tmp_path):
    path, output = tmp_path / "model.onnx", tmp_path / "made.onnx"
    places = np.random.default_rng(0).standard_normal((40, D)).astype(np.float32)
    onnx.save(sketch(ADDED, ONE | {"places": places}), path)

    result = quantize_model(path, output, QuantConfig())

    assert result.plan.constants == {"places": "float16"}
    assert "stays float" not in result.note
    stored = [graph.constant(v) for v in files.load(output).graph.initializers.values()]
    assert any(np.array_equal(x, places.astype(np.float16)) for x in stored if x is not None)


def test_a_large_table_that_float16_cannot_hold_says_why(tmp_path):
    path = tmp_path / "model.onnx"
    places = np.full((40, D), 1e6, np.float32)
    onnx.save(sketch(ADDED, ONE | {"places": places}), path)

    result = quantize_model(path, tmp_path / "made.onnx", QuantConfig())

    assert result.plan.constants == {"places": "float32: values up to 1e+06 overflow float16"}
    assert "places stays float: values up to 1e+06 overflow float16" in result.note


def test_a_weight_that_is_an_output_stays_exact(tmp_path):
    text = "(float[n,96] x) => (float[n,96] y, float[96,96] v) { y = MatMul(x, w) v = Identity(w) }"
    path, output = tmp_path / "model.onnx", tmp_path / "made.onnx"
    onnx.save(sketch(text, ONE), path)

    result = quantize_model(path, output, QuantConfig())

    assert "is an output of the model" in result.note
    assert np.array_equal(run(open_session(output), feed_of(text))[1], ONE["w"])
    assert output.stat().st_size <= path.stat().st_size


def test_one_row_of_a_table_with_column_scales_has_no_axis_of_rows(tmp_path):
    table = (RNG.normal(size=(64, D)) * np.logspace(-2, 2, D)).astype(np.float32)
    proto = sketch("(int64 i) => (float[96] y) { y = Gather(t, i) }", {"t": table})
    path, output = tmp_path / "model.onnx", tmp_path / "made.onnx"
    onnx.save(proto, path)

    quantize_model(path, output, QuantConfig())

    (row,) = run(open_session(output), {"i": np.array(3)})
    assert row.shape == (D,)
    assert np.all(np.abs(row - table[3]) <= 0.6 * np.abs(table).max(0) / 127)


def test_positions_that_are_added_to_data_are_no_weight(tmp_path):
    text = """(float[n,24,96] x) => (float[n,24,96] y) { s = Add(x, p) y = MatMul(s, w) }"""
    path = tmp_path / "model.onnx"
    onnx.save(sketch(text, ONE | weights(p=(24, D))), path)

    result = quantize_model(path, tmp_path / "made.onnx", QuantConfig())

    assert [node.weights for node in result.plan.nodes] == [("w",)]

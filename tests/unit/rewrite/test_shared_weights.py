"""A weight that several nodes read is stored once, and each of them still computes what it did."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from quant_core.calibrate.observe import observe
from quant_core.config import QuantConfig
from quant_core.model.prepare import prepare
from quant_core.model.session import open_session, run
from quant_core.numerics.granularity import BothAxes, PerChannel, PerTensor
from quant_core.numerics.saturation import unsafe_pairs
from quant_core.numerics.sqnr import sqnr_db
from quant_core.plan.make import make_plan
from quant_core.plan.targets import TARGETS
from quant_core.plan.types import Compute, NodeChoice, QuantPlan
from quant_core.rewrite.apply import apply_plan
from tests.models import random_feed, sketch
from tests.oracle.cases import weights

RNG = np.random.default_rng(0)
SQUARE = RNG.normal(size=(64, 64)).astype(np.float32)


def quantized(proto, folder, feeds=(), **config) -> tuple[QuantPlan, onnx.ModelProto]:
    path = folder / "model.onnx"
    onnx.save(proto, path)
    model = prepare(path, feeds)
    plan = make_plan(model, QuantConfig(**config), TARGETS["x86"])
    stats = observe(model, plan, feeds) if feeds else None
    return plan, ir.to_proto(apply_plan(model, plan, stats).model)


def outputs_db(original, made, feed) -> list[float]:
    """SQNR of each output in dB."""
    before = run(open_session(original.SerializeToString()), feed)
    after = run(open_session(made.SerializeToString()), feed)
    pairs = zip(before, after, strict=True)
    return [sqnr_db(float((a**2).sum()), float(((a - b) ** 2).sum())) for a, b in pairs]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("mode", ["dynamic", "weight_only"])
def test_a_square_table_that_is_multiplied_too_is_not_transposed(tmp_path, mode, bits):
    text = """(int64[n] ids, float[n,64] p) => (float[n,64] hard, float[n,64] soft) {
        hard = Gather(table, ids) soft = MatMul(p, table)
    }"""
    model = sketch(text, {"table": SQUARE})
    feed = {
        "ids": np.arange(0, 64, 7),
        "p": RNG.normal(size=(10, 64)).astype(np.float32),
    }

    _, made = quantized(model, tmp_path, mode=mode, bits=bits)

    assert min(outputs_db(model, made, feed)) > (30 if bits == 8 else 12)


READERS = {
    "a table and a Gemm": """(int64[n] ids) => (float[n,300] y) {
        e = Gather(table, ids) t = Tanh(e) y = Gemm<transB = 1>(t, table) }""",
    "a table and its transpose": """(int64[n] ids) => (float[n,300] y) {
        e = Gather(table, ids) t = Tanh(e) turned = Transpose<perm = [1, 0]>(table)
        y = MatMul(t, turned) }""",
    "Gemms with and without transB": """(float[n,64] x) => (float[n,64] y) {
        a = Gemm<transB = 1>(x, table) t = Tanh(a) y = Gemm(t, table) }""",
    "a product and its transpose": """(float[n,64] x) => (float[n,64] y) {
        turned = Transpose<perm = [1, 0]>(table) a = MatMul(x, turned) t = Tanh(a)
        y = MatMul(t, table) }""",
    "a product and a part": """(float[n,300] x) => (float[n,64] y, float[n,32] z) {
        y = MatMul(x, table) left, right = Split<axis = 1>(table, halves) p = MatMul(x, left)
        q = MatMul(x, right) z = Mul(p, q) }""",
    "a product and what picks its columns": """(int64[n] ids, float[n,300] x) => (float[n,64] y) {
        e = Gather(table, ids) p = MatMul(x, table) y = Mul(e, p) }""",
    "a table and products along both axes": """(int64[n] ids, float[n,300] x) => (float[n,300] y) {
        e = Gather(table, ids) p = MatMul(x, table) t = Add(e, p) y = Gemm<transB = 1>(t, table)
        }""",
    "a product outside of branches that transpose it": """(float[n,64] x, bool c) => (float[n,64] y)
        { a = Gemm<transB = 1>(x, table) t = Tanh(a) y = If(c) <
            then_branch = one () => (float[n,64] d) { d = Gemm(t, table) },
            else_branch = two () => (float[n,64] e) { m = Neg(t) e = MatMul(m, table) }> }""",
    "an LSTM and a product": """(float[5,1,64] x, float[n,64] z) => (float[n,300] y, float h) {
        rows = Reshape(table, whole) all, h, c = LSTM<hidden_size = 75>(x, rows, r)
        y = Gemm<transB = 1>(z, table) }""",
}


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("mode", ["dynamic", "weight_only"])
@pytest.mark.parametrize("runtime", ["folded", "qdq"])
@pytest.mark.parametrize("readers", READERS)
def test_a_weight_is_stored_once_whoever_reads_it(tmp_path, readers, runtime, mode, bits):
    """Tables and LSTMs take whole bytes in some ways, which all other readers then share."""
    table = RNG.normal(size=(300, 64)).astype(np.float32) / 8
    others = {"halves": np.array([32, 32]), "whole": np.array([1, 300, 64])}
    if "LSTM" in readers:
        others |= weights(r=(1, 300, 75))
    model = sketch(READERS[readers], {"table": table, **others})

    plan, made = quantized(model, tmp_path, mode=mode, runtime=runtime, bits=bits)

    kept = max(n.storage.bits for n in plan.nodes if n.storage) / 32
    assert kept < made.ByteSize() / model.ByteSize() < kept + 0.07
    assert min(outputs_db(model, made, random_feed(model))) > (30 if kept > 0.2 else 12)


@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_products_along_both_axes_of_a_weight_multiply_the_same_integers(tmp_path, mode):
    """They are safe from saturation along both, and have one scale."""
    table = RNG.normal(size=(64, 96)).astype(np.float32)
    model = sketch(
        """(float[n,64] x) => (float[n,96] h, float[n,64] y) {
            h = Gemm(x, table, b) t = Tanh(h) y = Gemm<transB = 1>(t, table, c)
        }""",
        {"table": table / 8, **weights(b=(96,), c=(64,))},
    )
    feeds = [random_feed(model, seed) for seed in range(4)]

    plan, made = quantized(model, tmp_path, feeds, mode=mode)

    assert {n.compute for n in plan.nodes if n.weights} == {Compute(mode)}
    assert QuantPlan.from_json(plan.to_json()) == plan
    stored = [numpy_helper.to_array(t) for t in made.graph.initializer if len(t.dims) == 2]
    assert [array.dtype for array in stored] == [np.int8]
    assert not len(unsafe_pairs(stored[0])) + len(unsafe_pairs(stored[0].T))
    assert min(outputs_db(model, made, feeds[0])) > 30


def test_a_table_has_the_scale_of_products_along_both_its_axes(tmp_path):
    text = """(int64[n] ids) => (float[n,64] y) {
        e = Gather(table, ids) a = Gemm<transB = 1>(e, table) t = Tanh(a) y = Gemm(t, table) }"""
    model = sketch(text, {"table": RNG.normal(size=(300, 64)).astype(np.float32) / 8})

    plan, made = quantized(model, tmp_path, mode="dynamic")

    products = [n.granularity for n in plan.nodes if n.op_type == "Gemm"]
    assert products == [BothAxes(), BothAxes()]
    assert made.ByteSize() < 0.3 * model.ByteSize()
    assert outputs_db(model, made, {"ids": np.arange(0, 300, 7)})[0] > 30


@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_where_one_scale_does_not_serve_both_axes_one_product_is_in_float(tmp_path, mode):
    table = RNG.normal(size=(64, 64)) * np.logspace(-3, 0, 64)[:, None]
    model = sketch(READERS["Gemms with and without transB"], {"table": np.float32(table)})
    feeds = [random_feed(model, seed) for seed in range(4)]

    plan, made = quantized(model, tmp_path, feeds, mode=mode)

    assert [n.compute for n in plan.nodes if n.weights] == [Compute(mode), Compute.FLOAT]
    assert made.ByteSize() < 0.4 * model.ByteSize()
    assert min(outputs_db(model, made, feeds[0])) > 30


def test_integer_kernels_that_share_a_weight_share_its_scales(tmp_path):
    model = sketch(
        "(float[n,64] x) => (float[n,64] y) { a = MatMul(x, w) t = Tanh(a) y = MatMul(t, w) }",
        {"w": SQUARE},
    )
    onnx.save(model, tmp_path / "model.onnx")
    prepared = prepare(tmp_path / "model.onnx")
    first, second = (str(n.name) for n in prepared.graph if n.op_type == "MatMul")
    choices = {first: NodeChoice(Compute.DYNAMIC, granularity=PerTensor())}
    in_4_bits = {first: NodeChoice(Compute.BLOCKS), second: NodeChoice(Compute.DYNAMIC)}

    plan = make_plan(prepared, QuantConfig(), TARGETS["x86"], choices)
    narrow = make_plan(prepared, QuantConfig(bits=4), TARGETS["x86"], in_4_bits)

    assert {n.granularity for n in plan.nodes} == {PerChannel()}
    assert {(n.compute, n.pair_safe) for n in narrow.nodes} == {(Compute.DYNAMIC, True)}


def test_a_product_of_constants_computes_in_float(tmp_path):
    """Nodes make it of fewer bytes than it has, as of the two factors of an adapter."""
    text = """(float[n,64] x) => (float[n,64] y) {
        p = MatMul(a, b) w = Add(table, p) h = MatMul(x, table) y = MatMul(h, w)
    }"""
    model = sketch(text, {"table": SQUARE / 8, **weights(a=(64, 4), b=(4, 64))})
    feeds = [random_feed(model)]

    _, made = quantized(model, tmp_path, feeds, mode="static")

    assert min(outputs_db(model, made, feeds[0])) > 25


@pytest.mark.parametrize("mode", ["dynamic", "weight_only"])
def test_a_table_in_a_branch_shares_the_integers_of_a_product_outside(tmp_path, mode):
    text = """(int64[n] ids, bool c) => (float[n,300] y) {
        e = If(c) <then_branch = one () => (float[n,64] a) { a = Gather(table, ids) },
                   else_branch = two () => (float[n,64] b) { d = Gather(table, ids) b = Neg(d) }>
        t = Tanh(e) y = Gemm<transB = 1>(t, table)
    }"""
    model = sketch(text, {"table": RNG.normal(size=(300, 64)).astype(np.float32)})

    _, made = quantized(model, tmp_path, mode=mode)

    assert made.ByteSize() < 0.34 * model.ByteSize()
    feed = {"ids": np.arange(0, 300, 7), "c": np.array(True)}
    assert min(outputs_db(model, made, feed)) > 30


def test_a_product_that_shares_a_table_keeps_a_scale_for_each_row(tmp_path):
    """One scale for all would not serve the table, and integers would be stored twice."""
    table = RNG.normal(size=(300, 64)).astype(np.float32)
    path = tmp_path / "model.onnx"
    onnx.save(sketch(READERS["a table and its transpose"], {"table": table}), path)
    model = prepare(path)
    product = next(str(n.name) for n in model.graph if n.op_type == "MatMul")
    one_scale = {product: NodeChoice(Compute.DYNAMIC, granularity=PerTensor())}

    plan = make_plan(model, QuantConfig(), TARGETS["x86"], one_scale)

    assert next(n for n in plan.nodes if n.node == product).granularity == PerChannel()


def test_other_readers_of_a_table_read_what_its_integers_stand_for(tmp_path):
    text = """(int64[n] ids, float[1,64] q) => (float[n,64] e, float[64,64] d) {
        e = Gather(table, ids) d = Sub(q, table)
    }"""
    model = sketch(text, {"table": SQUARE})
    feed = {"ids": np.arange(9), "q": np.ones((1, 64), np.float32)}

    _, made = quantized(model, tmp_path, mode="dynamic")

    assert made.ByteSize() < model.ByteSize() / 2
    assert min(outputs_db(model, made, feed)) > 30


def test_a_weight_that_an_excluded_node_reads_is_float_for_all(tmp_path):
    text = """(float[n,64] x) => (float[n,64] y, float[n,64] z) {
        y = MatMul(x, w) r = Relu(x) z = Gemm(r, w)
    }"""
    model = sketch(text, {"w": SQUARE})

    plan, made = quantized(model, tmp_path, mode="dynamic", exclude=("z",))

    assert [n.reason for n in plan.nodes if n.node == "y"] == ["its weight w is read in float by z"]
    assert [i.name for i in made.graph.initializer] == ["w"]


@pytest.mark.parametrize("runtime", ["folded", "qdq"])
def test_each_matrix_of_a_stack_has_scales_of_its_own(tmp_path, runtime):
    sizes = np.array([1.0, 1e-3, 0.03], np.float32)[:, None, None]
    stack = RNG.normal(size=(3, 32, 16)).astype(np.float32) * sizes
    model = sketch("(float[3,n,32] x) => (float[3,n,16] y) { y = MatMul(x, w) }", {"w": stack})
    feed = {"x": RNG.normal(size=(3, 5, 32)).astype(np.float32)}

    _, made = quantized(model, tmp_path, mode="weight_only", runtime=runtime)

    before = run(open_session(model.SerializeToString()), feed)[0]
    after = run(open_session(made.SerializeToString()), feed)[0]
    for exact, found in zip(before, after, strict=True):
        assert sqnr_db(float((exact**2).sum()), float(((exact - found) ** 2).sum())) > 30


@pytest.mark.parametrize("runtime", ["folded", "qdq"])
def test_each_group_of_a_transposed_conv_has_scales_of_its_own(tmp_path, runtime):
    weight = RNG.normal(size=(8, 1, 3, 3)).astype(np.float32)
    weight *= np.logspace(-3, 0, 8, dtype=np.float32)[:, None, None, None]
    text = """(float[n,8,6,6] x) => (float[n,8,a,b] y) { y = ConvTranspose<group = 8>(x, w) }"""
    model = sketch(text, {"w": weight})
    feed = {"x": RNG.normal(size=(1, 8, 6, 6)).astype(np.float32)}

    _, made = quantized(model, tmp_path, mode="weight_only", runtime=runtime)

    before = run(open_session(model.SerializeToString()), feed)[0][0]
    after = run(open_session(made.SerializeToString()), feed)[0][0]
    for exact, found in zip(before, after, strict=True):
        assert sqnr_db(float((exact**2).sum()), float(((exact - found) ** 2).sum())) > 30


def test_experts_that_are_gathered_from_a_stack_are_stored_in_8_bits(tmp_path):
    stack = RNG.normal(size=(4, 32, 32)).astype(np.float32)
    text = """(int64[1] e, float[1,5,32] x) => (float[1,5,32] y) {
        w = Gather(stack, e) y = MatMul(x, w)
    }"""
    model = sketch(text, {"stack": stack})
    feed = {"e": np.array([2]), "x": RNG.normal(size=(1, 5, 32)).astype(np.float32)}

    _, made = quantized(model, tmp_path, mode="dynamic")

    assert made.ByteSize() < model.ByteSize() / 3
    assert outputs_db(model, made, feed)[0] > 30


def test_a_weight_on_the_left_is_stored_in_8_bits(tmp_path):
    text = "(float[n,64,5] x) => (float[n,64,5] y) { y = MatMul(w, x) }"
    model = sketch(text, {"w": SQUARE})
    feed = {"x": RNG.normal(size=(2, 64, 5)).astype(np.float32)}

    plan, made = quantized(model, tmp_path, mode="dynamic")

    assert "on the left" in plan.nodes[0].reason
    assert made.ByteSize() < model.ByteSize() / 3
    assert outputs_db(model, made, feed)[0] > 30


def test_a_tensor_may_have_channels_on_different_axes_for_different_readers(tmp_path):
    text = """(float[n,24,32] x) => (float[n,8,a] y, float[n,24,16] z) {
        t = Relu(x) z = MatMul(t, wm) y = Conv(t, wc, b)
    }"""
    weights = {
        "wm": RNG.normal(size=(32, 16)).astype(np.float32),
        "wc": RNG.normal(size=(8, 24, 3)).astype(np.float32),
        "b": np.ones(8, np.float32),
    }
    model = sketch(text, weights)
    feed = {"x": RNG.normal(size=(2, 24, 32)).astype(np.float32)}

    plan, made = quantized(model, tmp_path, [feed], mode="static")

    assert sorted(plan.means["t"]) == [-1, 1]
    assert QuantPlan.from_json(plan.to_json()) == plan
    assert min(outputs_db(model, made, feed)) > 25


def test_an_output_that_is_listed_twice_stays_listed_twice(tmp_path):
    model = sketch("(float[n,64] x) => (float[n,64] y) { y = MatMul(x, w) }", {"w": SQUARE})
    model.graph.output.append(model.graph.output[0])
    feed = {"x": RNG.normal(size=(2, 64)).astype(np.float32)}

    _, made = quantized(model, tmp_path, [feed], mode="static")

    assert [o.name for o in made.graph.output] == ["y", "y"]


def test_a_weight_that_a_loop_carries_unchanged_is_stored_in_8_bits(tmp_path):
    text = """(float[1,64] x) => (float[1,64] y) {
        y, last = Loop<body = loop (int64 i, bool c, float[1,64] s, float[64,64] v) =>
            (bool d, float[1,64] t, float[64,64] u) {
                d = Identity(c) m = MatMul(s, v) t = Tanh(m) u = Identity(v)
            }>(n, go, x, w)
    }"""
    model = sketch(text, {"w": SQUARE / 8, "n": np.int64(3), "go": np.bool_(True)})
    feed = {"x": RNG.normal(size=(1, 64)).astype(np.float32)}

    _, made = quantized(model, tmp_path, mode="dynamic")

    assert made.ByteSize() < model.ByteSize() / 3
    assert outputs_db(model, made, feed)[0] > 25


def test_the_steps_of_an_unrolled_loop_store_their_bias_once(tmp_path):
    steps = " ".join(f"a{i} = Gemm(h{i}, w, b) h{i + 1} = Tanh(a{i})" for i in range(6))
    model = sketch(
        f"(float[n,32] h0) => (float[n,32] y) {{ {steps} y = Identity(h6) }}",
        weights(w=(32, 32), b=(32,)),
    )
    feeds = [{"h0": RNG.normal(size=(8, 32)).astype(np.float32)} for _ in range(4)]

    plan, made = quantized(model, tmp_path, feeds, mode="static")

    stored = [t for t in made.graph.initializer if t.data_type == onnx.TensorProto.INT32]
    inputs = {n.input[0] for n in model.graph.node if n.op_type == "Gemm"}
    assert len(inputs) == 6
    assert len({plan.activations[name] for name in inputs}) == 1
    assert len(stored) == 1
    assert min(outputs_db(model, made, feeds[0])) > 25


def test_a_head_whose_bias_is_small_beside_its_weight_keeps_a_range_for_each_level(tmp_path):
    model = sketch(
        """(float[n,256] p, float[n,256] q) => (float[n,8] a, float[n,8] c) {
            a = Gemm(p, w, b) c = Gemm(q, w, b)
        }""",
        weights(w=(256, 8), b=(8,)),
    )
    feed = {"p": RNG.normal(size=(8, 256)), "q": 100 * RNG.normal(size=(8, 256))}
    feeds = [{name: x.astype(np.float32) for name, x in feed.items()}]

    plan, made = quantized(model, tmp_path, feeds, mode="static")

    assert plan.activations["p"] != plan.activations["q"]
    assert min(outputs_db(model, made, feeds[0])) > 25

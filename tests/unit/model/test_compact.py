"""Constants that nodes make of fewer bytes stay made by nodes: no file grows."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from quant_core.api import quantize_model
from quant_core.config import QuantConfig
from quant_core.model.compact import keep_compact
from quant_core.model.prepare import prepare
from quant_core.model.session import open_session, run
from tests.models import normalized, random_feed, sketch

W = np.random.default_rng(0).normal(size=(32, 32)).astype(np.float32) / 6


def saved(folder, text, **constants):
    path = folder / "model.onnx"
    onnx.save(sketch(text, constants), path)
    return path


def operators(model) -> list[str]:
    return sorted(node.op_type for node in model.graph)


def test_a_mask_that_nodes_make_is_not_written_out(tmp_path):
    text = """(float[n,32,32] x) => (float[n,32,32] y) {
        ones = ConstantOfShape<value = float[1] {1.0}>(shape) upper = Trilu(ones)
        mask = Mul(upper, low) a = MatMul(x, w) y = Add(a, mask)
    }"""
    low = np.array(-9.0, np.float32)
    path = saved(tmp_path, text, w=W, low=low, shape=np.array([32, 32]))

    model = prepare(path)

    assert operators(model) == ["Add", "ConstantOfShape", "MatMul", "Mul", "Trilu"]
    assert "mask" not in model.graph.initializers


@pytest.mark.parametrize("read", ["Add", "Sub"])
def test_two_tables_share_the_nodes_that_make_them(tmp_path, read):
    text = f"""(float[n,32] x) => (float[512,32] y, float[512,32] z) {{
        angle = Mul(places, rates) c = Cos(angle) s = Sin(angle)
        a = MatMul(x, w) y = {read}(a, c) z = {read}(a, s)
    }}"""
    places = np.arange(512, dtype=np.float32)[:, None]
    path = saved(tmp_path, text, w=W, places=places, rates=np.ones((1, 32), np.float32))

    model = prepare(path)

    assert operators(model) == sorted(["Mul", "Cos", "Sin", "MatMul", read, read])
    feed = {"x": np.ones((1, 32), np.float32)}
    for a, b in zip(run(open_session(path), feed), run(open_session(model), feed), strict=True):
        assert np.allclose(a, b, atol=1e-6)


def test_constants_of_nodes_may_lie_in_a_file_of_their_own(tmp_path):
    path = saved(tmp_path, "(float[n,32] x) => (float[n,32] y) { w = Constant() y = MatMul(x, w) }")
    model = onnx.load(path)
    value = helper.make_attribute("value", numpy_helper.from_array(W))
    model.graph.node[0].attribute.append(value)
    apart = {"location": "w", "size_threshold": 0, "convert_attribute": True}
    onnx.save(model, path, save_as_external_data=True, **apart)

    assert operators(prepare(path)) == ["MatMul"]


def test_a_weight_that_is_as_large_as_what_it_is_made_of_is_folded(tmp_path):
    text = """(float[n,32] x) => (float[n,32] y) {
        t = Transpose<perm = [1, 0]>(w) s = Mul(t, two) y = MatMul(x, s)
    }"""
    path = saved(tmp_path, text, w=W, two=np.array(2, np.float32))

    assert operators(prepare(path)) == ["MatMul"]


def test_nodes_in_a_branch_stay_in_it(tmp_path):
    text = """(float[n,32] x, bool c) => (float[n,32] y) { y = If(c) <
        then_branch = a () => (float[n,32] t) { v = Expand(row, shape) t = MatMul(x, v) },
        else_branch = b () => (float[n,32] e) { v = Tile(row, twice) e = MatMul(x, v) }
    > }"""
    row = {"row": W[:1], "shape": np.array([32, 32]), "twice": np.array([32, 1])}
    path = saved(tmp_path, text, **row)

    result = quantize_model(path, tmp_path / "made.onnx", QuantConfig())

    assert "nodes make it of fewer bytes" in result.note
    assert result.size_bytes <= path.stat().st_size
    for taken in (True, False):
        feed = {"x": np.ones((2, 32), np.float32), "c": np.array(taken)}
        (a,), (b,) = (run(open_session(p), feed) for p in (path, tmp_path / "made.onnx"))
        assert np.allclose(a, b, atol=1e-5)


def test_a_weight_of_few_scattered_numbers_stays_scattered(tmp_path):
    text = """(float[n,64] x) => (float[n,512] y) {
        zeros = ConstantOfShape<value = float[1] {0.0}>(size)
        flat = ScatterElements<axis = 0>(zeros, places, numbers) w = Reshape(flat, shape)
        y = MatMul(x, w)
    }"""
    places = np.arange(0, 64 * 512, 97)
    numbers = np.ones(len(places), np.float32)
    shapes = {"size": np.array([64 * 512]), "shape": np.array([64, 512])}
    path = saved(tmp_path, text, places=places, numbers=numbers, **shapes)

    result = quantize_model(path, tmp_path / "made.onnx", QuantConfig(bits=4))

    assert result.plan.constants == {
        "w": "float32: nodes make it of fewer bytes than its integers have"
    }
    assert (tmp_path / "made.onnx").read_bytes() == path.read_bytes()
    feed = random_feed(onnx.load(path))
    assert run(open_session(tmp_path / "made.onnx"), feed)


@pytest.mark.parametrize("place", ["initializer", "Constant"])
def test_a_sparse_tensor_of_few_numbers_stays_small(tmp_path, place):
    numbers = onnx.numpy_helper.from_array(np.linspace(1, 2, 100, dtype=np.float32), "w")
    places = onnx.numpy_helper.from_array(np.arange(0, 100 * 320, 320), "w_places")
    sparse = onnx.helper.make_sparse_tensor(numbers, places, [128, 250])
    model = sketch("(float[n,128] x) => (float[n,250] y) { y = MatMul(x, w) }")
    if place == "initializer":
        model.graph.sparse_initializer.append(sparse)
    else:
        model.graph.node.insert(
            0, onnx.helper.make_node("Constant", [], ["w"], sparse_value=sparse)
        )
    path, output = tmp_path / "model.onnx", tmp_path / "made.onnx"
    onnx.save(model, path)

    quantize_model(path, output, QuantConfig())

    assert output.stat().st_size <= path.stat().st_size
    feed = random_feed(model)
    (exact,), (found,) = (run(open_session(p), feed) for p in (path, output))
    assert np.allclose(exact, found, atol=1e-5)


def test_what_is_made_again_later_stands_ahead_of_what_reads_it():
    """The column is made again first, of a scale that is still a constant then."""
    made = "scale = ConstantOfShape<value = float[1] {0.5}>(shape) column = Unsqueeze(scale, axes)"
    used = "a = Mul(x, column) b = MatMul(a, w) y = Add(b, scale)"
    interface = "(float[n,512,512] x) => (float[n,512,512] y)"
    w = np.zeros((512, 512), np.float32)
    dense = {"column": np.full((512, 1), 0.5, np.float32), "scale": np.full(512, 0.5, np.float32)}
    leaves = {"shape": np.array([512]), "axes": np.array([1])}
    folded = normalized(sketch(f"{interface} {{ {used} }}", {**dense, "w": w}))

    keep_compact(folded, normalized(sketch(f"{interface} {{ {made} {used} }}", {**leaves, "w": w})))

    assert operators(folded) == ["Add", "ConstantOfShape", "MatMul", "Mul", "Unsqueeze"]
    seen = set()
    for node in folded.graph:
        assert {v.producer() for v in node.inputs if v is not None} <= seen | {None}
        seen.add(node)


def test_all_parts_of_a_weight_that_is_also_read_whole_are_made_by_one_split(tmp_path):
    text = """(float[n,32] x) => (float[n,32] y, float[n,16] z) {
        y = MatMul(x, w) a, b = Split<axis = 1>(w, sizes) p = MatMul(x, a) q = MatMul(x, b)
        z = Add(p, q)
    }"""
    path = saved(tmp_path, text, w=W, sizes=np.array([16, 16]))

    model = prepare(path, stays_float=True)

    assert operators(model).count("Split") == 1
    assert {"a", "b"}.isdisjoint(model.graph.initializers)
    feed = {"x": W}
    for a, b in zip(run(open_session(path), feed), run(open_session(model), feed), strict=True):
        assert np.array_equal(a, b)


def test_a_constant_that_the_optimizer_transposes_is_not_made_by_its_former_nodes(tmp_path):
    """onnxruntime turns the table in place of both Transposes, and it keeps its name."""
    text = """(float[n,16,16] x) => (float[n,16,16] y) {
        table = Mul(column, row) t = Transpose<perm = [0, 2, 1]>(x) a = Add(t, table)
        y = Transpose<perm = [0, 2, 1]>(a)
    }"""
    column, row = np.arange(16, dtype=np.float32)[:, None], np.ones((1, 16), np.float32)
    path = saved(tmp_path, text, column=column[None], row=row)

    model = prepare(path)

    feed = {"x": np.zeros((1, 16, 16), np.float32)}
    (exact,), (found,) = (run(open_session(m), feed) for m in (path, model))
    assert np.array_equal(exact, found)

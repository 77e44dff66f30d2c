"""What a user sees of the optimizer: a float file, and plans that know what went."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest

import quant_core
from quant_core.evaluate.timing import Timing
from quant_core.model.session import open_session
from quant_core.search import prepared
from tests.models import random_feed, sketch

RNG = np.random.default_rng(8)
CONSTANTS = {
    "w": RNG.standard_normal((8, 3, 3, 3)).astype(np.float32),
    "v": RNG.standard_normal((4, 8, 1, 1)).astype(np.float32),
    "s": np.float32([2]),
    "t": np.float32([0.5]),
}
TEXT = """(float[n, 3, 8, 8] x) => (float[n, 4, 6, 6] y)
          { c = Conv(x, w) m = Mul(c, s) a = Add(m, t) r = Relu(a) y = Conv(r, v) }"""


@pytest.fixture
def model(tmp_path) -> Path:
    onnx.save(sketch(TEXT, CONSTANTS), tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


def test_a_float_model_is_written_that_computes_the_same_with_fewer_nodes(model, tmp_path):
    output = tmp_path / "o.onnx"

    result = quant_core.optimize_model(model, output)

    feed = random_feed(onnx.load(model))
    (a,), (b,) = (open_session(path).run(None, feed) for path in (model, output))
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    assert [node.op_type for node in onnx.load(output).graph.node] == ["Conv", "Relu", "Conv"]
    assert result.rewrites == [{"rule": "fold_into_producer", "node": "c", "absorbed": ["m", "a"]}]


@pytest.fixture
def small(tmp_path) -> Path:
    """Nothing can be won here, and what is written of a rewritten model takes bytes."""
    path = tmp_path / "small.onnx"
    onnx.save(sketch("(float[n] x) => (float[n] y) { y = Relu(x) }", {}), path)
    return path


def test_what_would_be_larger_and_no_faster_is_a_copy_of_its_original(small, tmp_path, monkeypatch):
    monkeypatch.setattr(prepared, "measure", lambda *_, **__: Timing(1, 1, 1, 1, 1.0, 1, 1, 9, 1))

    result = quant_core.optimize_model(small, tmp_path / "o.onnx")

    assert (tmp_path / "o.onnx").read_bytes() == small.read_bytes()
    assert result.size_bytes == result.float_size_bytes
    assert result.note.startswith("a copy of its original")


def test_a_file_that_is_larger_than_its_original_says_so(small, tmp_path, monkeypatch):
    monkeypatch.setattr(prepared, "measure", lambda *_, **__: Timing(3, 1, 3, 1, 3.0, 3, 3, 9, 1))

    result = quant_core.optimize_model(small, tmp_path / "o.onnx")

    added = result.size_bytes - small.stat().st_size
    assert added > 0
    assert result.note == f"{added} bytes larger than its original"


@pytest.mark.parametrize(("speedup", "is_copy"), [(1.05, True), (1.5, False)])
def test_twice_the_bytes_are_worth_more_than_the_noise_of_the_clock(
    tmp_path, monkeypatch, speedup, is_copy
):
    path, output = tmp_path / "half.onnx", tmp_path / "o.onnx"
    text = "(float[n,64] x) => (float[n,64] y) { v = Cast<to = 1>(w) y = MatMul(x, v) }"
    weight = (1e-3 * RNG.standard_normal((64, 64))).astype(ml_dtypes.bfloat16)
    onnx.save(sketch(text, {"w": weight}), path)
    timing = Timing(speedup, 1, speedup, 1, speedup, 1, 1, 9, 1)
    monkeypatch.setattr(prepared, "measure", lambda *_, **__: timing)

    result = quant_core.optimize_model(path, output)

    assert result.note.startswith("a copy of its original") == is_copy


def test_a_plan_lists_the_rewrites_and_a_glob_may_name_what_went(model):
    plan = quant_core.plan_model(model, quant_core.QuantConfig(exclude=("m",)))

    assert [(change.node, change.absorbed) for change in plan.rewrites] == [("c", ("m", "a"))]
    reasons = {node.node: node.reason for node in plan.nodes}
    assert reasons["c"] == "excluded by m"
    assert quant_core.plan_model(model).from_json(plan.to_json()) == plan


def test_without_optimization_the_graph_stays_as_it_is(model):
    plan = quant_core.plan_model(model, quant_core.QuantConfig(optimize=False))

    assert plan.rewrites == ()


def test_a_plan_with_rewrites_makes_the_same_bytes_again(model, tmp_path):
    first, second = tmp_path / "a.onnx", tmp_path / "b.onnx"
    made = quant_core.quantize_with_calibration(model, first, mode="static", num_samples=2)

    quant_core.quantize_model(
        model, second, plan=made.plan, calibration=quant_core.SampleSpec(count=2)
    )

    assert made.plan.rewrites
    assert first.read_bytes() == second.read_bytes()


def test_the_quantized_file_is_compared_node_by_node_with_what_it_was_made_of(model, tmp_path):
    output = tmp_path / "q.onnx"
    quant_core.quantize_with_calibration(model, output, mode="static", num_samples=2)

    found = quant_core.validate_model(model, output, quant_core.SampleSpec(count=2), detailed=True)

    assert {row["node"] for row in found.sensitivity} == {"c", "y"}


@pytest.mark.parametrize("kind", ["float", "float16"])
def test_a_weight_that_is_also_read_transposed_is_stored_once_in_its_type(tmp_path, kind):
    text = f"""(int64[n] ids) => ({kind}[n, 48] y) {{
        e = Gather(t, ids) h = Tanh(e) across = Transpose<perm = [1, 0]>(t) y = MatMul(h, across)
    }}"""
    path, output = tmp_path / "tied.onnx", tmp_path / "o.onnx"
    table = RNG.standard_normal((48, 32)).astype({"float": np.float32, "float16": np.float16}[kind])
    onnx.save(sketch(text, {"t": table}), path)

    quant_core.optimize_model(path, output)

    assert output.stat().st_size < path.stat().st_size + 1000
    assert quant_core.validate_model(path, output, detailed=True).fidelity.sound_db > 60


@pytest.mark.parametrize("speedup", [1.0, 1.5])
def test_tensors_that_share_bytes_of_a_file_make_it_larger_with_a_word(
    tmp_path, monkeypatch, speedup
):
    """The first 60 rows of one are the last 60 of the other."""
    path, output = tmp_path / "shared.onnx", tmp_path / "o.onnx"
    text = "(float[n,64] x) => (float[n,64] y) { a = MatMul(x, v) b = Relu(a) y = MatMul(b, w) }"
    model = sketch(text, {})
    rows = RNG.standard_normal((68, 64), dtype=np.float32)
    (tmp_path / "rows.bin").write_bytes(rows.tobytes())
    for name, first in (("v", 0), ("w", 4)):
        tensor = model.graph.initializer.add(name=name, data_type=1, dims=(64, 64))
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", "rows.bin"), ("offset", str(256 * first))):
            tensor.external_data.add(key=key, value=value)
    onnx.save(model, path)
    timing = Timing(speedup, 1, speedup, 1, speedup, 1, 1, 9, 1)
    monkeypatch.setattr(prepared, "measure", lambda *_, **__: timing)

    result = quant_core.optimize_model(path, output)

    assert result.float_size_bytes == path.stat().st_size + rows.nbytes
    added = result.size_bytes - result.float_size_bytes
    assert f"{added} bytes larger than its original" in result.note


def test_convs_over_time_become_images_unless_they_may_compute_in_integers(tmp_path, monkeypatch):
    monkeypatch.setattr(prepared, "measure", lambda *_, **__: Timing(1, 1, 1, 1, 2.0, 2, 2, 9, 1))
    proto = sketch(
        "(float[n, 3, 8] x) => (float[n, 4, 6] y) { y = Conv(x, w) }",
        {"w": RNG.standard_normal((4, 3, 3)).astype(np.float32)},
    )
    onnx.save(proto, tmp_path / "m.onnx")

    optimized = quant_core.optimize_model(tmp_path / "m.onnx", tmp_path / "o.onnx")
    stored = quant_core.plan_model(tmp_path / "m.onnx")
    static = quant_core.plan_model(tmp_path / "m.onnx", samples="random")

    assert [change["rule"] for change in optimized.rewrites] == ["flat_images"]
    assert [change.rule for change in stored.rewrites] == ["flat_images"]
    assert not static.rewrites

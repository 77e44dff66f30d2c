"""Models that take sequences, optionals or maps are fed, calibrated and checked as others are."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from quant_core.api import quantize_with_calibration
from quant_core.data.inputs import input_specs
from quant_core.data.samples import open_samples
from quant_core.data.spec import SampleSpec
from quant_core.errors import DataError
from quant_core.model.session import open_session, run
from tests.models import sketch

WEIGHT = np.random.default_rng(0).standard_normal((32, 32)).astype(np.float32)


def saved(path, nodes, source, *constants):
    """A model of these nodes, then y = x W."""
    nodes = [*nodes, helper.make_node("MatMul", ["x", "w"], ["y"], "product")]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 32])
    tensors = [numpy_helper.from_array(a, name) for name, a in (*constants, ("w", WEIGHT))]
    graph = helper.make_graph(nodes, "g", [source], [output], tensors)
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("ai.onnx.ml", 3)]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=8), path / "m.onnx")
    return path / "m.onnx"


def of_a_sequence(path):
    source = helper.make_tensor_sequence_value_info("s", TensorProto.FLOAT, ["n", 32])
    node = helper.make_node("SequenceAt", ["s", "first"], ["x"])
    return saved(path, [node], source, ("first", np.array(0)))


def of_an_optional(path):
    """One that multiplies by 0 what it lacks."""
    held = helper.make_tensor_type_proto(TensorProto.FLOAT, ["n", 32])
    branches = {
        "then_branch": [helper.make_node("OptionalGetElement", ["s"], ["given"])],
        "else_branch": [helper.make_node("Identity", ["none"], ["given"])],
    }
    output = helper.make_tensor_value_info("given", TensorProto.FLOAT, None)
    graphs = {
        name: helper.make_graph(nodes, name, [], [output]) for name, nodes in branches.items()
    }
    nodes = [
        helper.make_node("OptionalHasElement", ["s"], ["is_given"]),
        helper.make_node("If", ["is_given"], ["x"], **graphs),
    ]
    source = helper.make_value_info("s", helper.make_optional_type_proto(held))
    return saved(path, nodes, source, ("none", np.zeros((1, 32), np.float32)))


def of_a_map(path):
    kind = helper.make_map_type_proto(TensorProto.STRING, helper.make_tensor_type_proto(1, []))
    node = helper.make_node(
        "DictVectorizer", ["s"], ["x"], domain="ai.onnx.ml",
        string_vocabulary=[f"word{i}" for i in range(32)],
    )  # fmt: skip
    return saved(path, [node], helper.make_value_info("s", kind))


@pytest.mark.parametrize("make", [of_a_sequence, of_an_optional, of_a_map])
def test_random_samples_are_drawn_and_the_model_computes_in_integers(tmp_path, make):
    path = make(tmp_path)

    made = quantize_with_calibration(path, tmp_path / "q.onnx", mode="static", num_samples=4)

    assert [str(node.compute) for node in made.plan.nodes] == ["static"]
    assert made.worst_db > 30


@pytest.mark.parametrize(
    ("make", "value"),
    [
        (of_a_sequence, [np.ones((2, 32), np.float32), np.zeros((1, 32))]),
        (of_a_map, {"word3": 1.5, "word5": -2.0}),
    ],
)
def test_lists_and_mappings_from_python_are_fed(tmp_path, make, value):
    path = make(tmp_path)
    samples = open_samples(SampleSpec([{"s": value}]), input_specs(path), path)

    (y,) = run(open_session(path), samples[0])

    x = np.ones((2, 32)) if make is of_a_sequence else np.eye(32)[[3]] * 1.5 - 2 * np.eye(32)[[5]]
    np.testing.assert_allclose(y, x @ WEIGHT, rtol=1e-4, atol=1e-5)
    assert (
        samples.digest()
        != open_samples(SampleSpec([{"s": type(value)()}]), input_specs(path), path).digest()
    )


@pytest.mark.parametrize(
    ("make", "wrong", "hint"),
    [(of_a_sequence, {"a": 1.0}, "list of arrays"), (of_a_map, np.ones(3), "mapping of keys")],
)
def test_another_kind_of_value_is_refused(tmp_path, make, wrong, hint):
    path = make(tmp_path)
    samples = open_samples(SampleSpec([{"s": wrong}]), input_specs(path), path)

    with pytest.raises(DataError, match=hint):
        samples[0]


@pytest.mark.parametrize("feed", [{"s": np.ones((2, 32), np.float32)}, {"s": None}, {}])
def test_an_optional_input_is_given_or_absent(tmp_path, feed):
    path = of_an_optional(tmp_path)
    samples = open_samples(SampleSpec([feed]), input_specs(path), path)

    (y,) = run(open_session(path), samples[0])

    expected = np.zeros((1, 32)) if feed.get("s") is None else feed["s"] @ WEIGHT
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    assert samples.digest() == open_samples(SampleSpec([dict(feed)]), input_specs(path)).digest()


def test_given_sequences_of_several_tensors_calibrate(tmp_path):
    path, rng = of_a_sequence(tmp_path), np.random.default_rng(0)
    feeds = [{"s": list(rng.standard_normal((2, 1, 32), np.float32))} for _ in range(3)]

    made = quantize_with_calibration(path, tmp_path / "q.onnx", feeds, mode="static")
    of_same = quantize_with_calibration(path, tmp_path / "s.onnx", feeds[:1] * 3, mode="static")

    assert "samples are the same" not in made.note
    assert "samples are the same" in of_same.note


def test_a_model_that_writes_tensors_of_unlike_shapes_as_a_sequence_is_quantized(tmp_path):
    text = """(float[n, 32] x) => (float[n, 32] y, seq(float) s) {
        y = MatMul(x, w) total = ReduceSum<keepdims = 0>(y) s = SequenceConstruct(y, total)
    }"""
    onnx.save(sketch(text, {"w": WEIGHT}), tmp_path / "m.onnx")
    x = np.random.default_rng(1).standard_normal((8, 32)).astype(np.float32)

    quantize_with_calibration(tmp_path / "m.onnx", tmp_path / "q.onnx", {"x": x})

    [y, pair] = run(open_session(tmp_path / "q.onnx"), {"x": x})
    assert [item.shape for item in pair] == [y.shape, ()]
    assert np.array_equal(pair[0], y)

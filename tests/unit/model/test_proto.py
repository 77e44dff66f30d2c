"""What onnx_ir cannot hold survives reading and writing."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from quant_core.api import quantize
from quant_core.errors import ModelError
from quant_core.model import files
from quant_core.model.prepare import prepare
from quant_core.model.proto import from_proto, to_proto
from quant_core.model.write import write_model
from tests.models import sketch


def classifier() -> onnx.ModelProto:
    """x (n, 4) -> MatMul -> Softmax -> ZipMap -> a sequence of maps."""
    weight = np.random.default_rng(0).normal(size=(4, 2)).astype(np.float32)
    model = sketch(
        "(float[n, 4] x) => (float[n, 2] p) { m = MatMul(x, w) p = Softmax(m) }", {"w": weight}
    )
    node = helper.make_node(
        "ZipMap", ["p"], ["maps"], domain="ai.onnx.ml", classlabels_int64s=[3, 7]
    )
    model.graph.node.append(node)
    a_map = helper.make_map_type_proto(TensorProto.INT64, helper.make_tensor_type_proto(1, None))
    kind = helper.make_sequence_type_proto(a_map)
    model.graph.output.append(helper.make_value_info("maps", kind))
    model.opset_import.append(helper.make_opsetid("ai.onnx.ml", 3))
    return model


def sparse(values, indices, shape, name="w"):
    return helper.make_sparse_tensor(
        numpy_helper.from_array(np.asarray(values, np.float32), name),
        numpy_helper.from_array(np.asarray(indices, np.int64), f"{name}_indices"),
        shape,
    )


def test_a_type_that_holds_a_map_is_written_as_it_was_read():
    original = classifier()

    written = to_proto(from_proto(classifier()))

    assert written.graph.output[1] == original.graph.output[1]


def test_a_model_with_maps_is_prepared_and_written(tmp_path):
    onnx.save(classifier(), tmp_path / "m.onnx")

    write_model(prepare(tmp_path / "m.onnx"), tmp_path / "q.onnx")

    assert onnx.load(tmp_path / "q.onnx").graph.output == classifier().graph.output
    x = np.ones((1, 4), np.float32)
    runs = [
        ort.InferenceSession(tmp_path / n).run(None, {"x": x})[1][0] for n in ("m.onnx", "q.onnx")
    ]
    assert runs[0].keys() == runs[1].keys()


def test_a_model_with_maps_is_quantized(tmp_path):
    onnx.save(classifier(), tmp_path / "m.onnx")

    quantize(tmp_path / "m.onnx", tmp_path / "q.onnx")

    kinds = [output.type for output in ort.InferenceSession(tmp_path / "q.onnx").get_outputs()]
    assert kinds == ["tensor(float)", "seq(map(int64,tensor(float)))"]


def test_nodes_that_stand_before_what_they_read_are_put_in_order():
    """onnxruntime runs such files, and its converter to float16 writes them."""
    text = """(float[n] x, bool c) => (float[n] y) {
        a = Neg(x) b = If (c) <
            then_branch = t () => (float[n] p) { p = Abs(a) },
            else_branch = e () => (float[n] q) { q = Exp(a) }
        > y = Relu(b)
    }"""
    model = sketch(text, {})
    nodes = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([nodes[1], nodes[2], nodes[0]])

    read = from_proto(model)

    assert [node.op_type for node in read.graph] == ["Neg", "If", "Relu"]
    read.clone()


@pytest.mark.parametrize("indices", [[1, 4], [[0, 1], [1, 1]]], ids=["flat", "coordinates"])
def test_a_sparse_initializer_is_read_as_a_dense_one(indices):
    model = sketch("(float[n, 2] x) => (float[n, 3] y) { y = MatMul(x, w) }", {})
    model.graph.sparse_initializer.append(sparse([5.0, 7.0], indices, (2, 3)))

    read = from_proto(model)

    expected = [[0, 5, 0], [0, 7, 0]]
    assert read.graph.initializers["w"].const_value.numpy().tolist() == expected


def test_a_sparse_constant_is_read_as_a_dense_one():
    model = sketch("(float[n, 2] x) => (float[n, 3] y) { y = MatMul(x, w) }", {})
    node = helper.make_node("Constant", [], ["w"], sparse_value=sparse([5.0], [5], (2, 3)))
    model.graph.node.insert(0, node)

    read = from_proto(model)

    assert next(iter(read.graph)).attributes["value"].as_tensor().numpy()[1, 2] == 5


@pytest.mark.parametrize("shape", [(1 << 20, 1 << 20), (2, 2)], ids=["too large", "too small"])
def test_a_sparse_tensor_that_cannot_be_dense_is_refused(shape):
    model = sketch("(float[n, 2] x) => (float[n, 3] y) { y = MatMul(x, w) }", {})
    model.graph.sparse_initializer.append(sparse([5.0], [4], shape))

    with pytest.raises(ModelError, match="sparse"):
        from_proto(model)


def test_the_full_name_of_onnx_s_domain_is_its_domain(tmp_path):
    model = sketch("(float[n, 2] x) => (float[n, 2] y) { y = Relu(x) }", {})
    model.opset_import[0].domain = "ai.onnx"
    model.graph.node[0].domain = "ai.onnx"
    onnx.save(model, tmp_path / "m.onnx")

    read = files.load(tmp_path / "m.onnx")

    assert read.graph.opset_imports == {"": 17}


def test_data_of_a_linked_model_may_lie_beside_the_real_file(tmp_path):
    """As in the cache of a model hub: links in one folder, files in another."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    weight = np.ones((4, 300), np.float32)
    model = sketch("(float[n, 4] x) => (float[n, 300] y) { y = MatMul(x, w) }", {"w": weight})
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="m.data")
    for name, blob in (("m.onnx", "c0ffee"), ("m.data", "beef")):
        (tmp_path / name).replace(blobs / blob)
        (snapshot / name).symlink_to(blobs / blob)

    loaded = files.load(snapshot / "m.onnx")

    assert loaded.graph.initializers["w"].const_value.numpy().sum() == 1200
    (snapshot / "m.data").unlink()
    (snapshot / "m.data").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").write_bytes(bytes(4800))
    with pytest.raises(ModelError, match="outside"):
        files.load(snapshot / "m.onnx")


def test_a_model_of_other_domains_alone_need_not_declare_onnx_s(tmp_path):
    node = helper.make_node("Binarizer", ["x"], ["y"], domain="ai.onnx.ml", threshold=1.0)
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy"]
    graph = helper.make_graph([node], "g", values[:1], values[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("ai.onnx.ml", 1)])
    onnx.save(model, tmp_path / "m.onnx")

    with pytest.raises(ModelError, match=r"nothing to quantize.*Binarizer"):
        quantize(tmp_path / "m.onnx", tmp_path / "q.onnx")


def with_default(ir_version: int) -> onnx.ModelProto:
    """y = (x * gain) w, in which both constants are inputs too."""
    weights = {"gain": np.array([2.0], np.float32), "w": np.ones((4, 300), np.float32)}
    text = "(float[n, 4] x) => (float[n, 300] y) { a = Mul(x, gain) y = MatMul(a, w) }"
    model = sketch(text, weights, ir_version=ir_version)
    for name, array in weights.items():
        model.graph.input.append(
            helper.make_tensor_value_info(name, TensorProto.FLOAT, array.shape)
        )
    return model


@pytest.mark.parametrize("options", [{}, {"bits": 4}])
def test_a_default_value_of_an_input_may_still_be_replaced(tmp_path, options):
    onnx.save(with_default(8), tmp_path / "m.onnx")

    quantize(tmp_path / "m.onnx", tmp_path / "q.onnx", **options)

    session = ort.InferenceSession(tmp_path / "q.onnx")
    assert [value.name for value in session.get_overridable_initializers()] == ["gain"]
    x = np.ones((1, 4), np.float32)
    usual = session.run(None, {"x": x})[0]
    assert np.allclose(
        session.run(None, {"x": x, "gain": np.array([4.0], np.float32)})[0], usual * 2
    )


def test_constants_that_are_all_inputs_are_meant_as_constants():
    model = with_default(8)
    for name in ("p", "q", "r"):
        model.graph.initializer.append(numpy_helper.from_array(np.ones(1, np.float32), name))
        model.graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]))

    assert [value.name for value in from_proto(model).graph.inputs] == ["x"]


def test_inputs_with_values_were_constants_before_ir_version_4():
    read = from_proto(with_default(3))

    assert [value.name for value in read.graph.inputs] == ["x"]


def test_constants_of_a_branch_of_a_branch_are_read_once(tmp_path):
    """onnxruntime's optimizer writes them as initializers and as nodes."""
    text = """(float[n, 4] x, bool p) => (float[n, 4] y) {
        h = MatMul(x, w)
        y = If(p) <
            then_branch = a () => (float[n, 4] u) {
                u = If(p) <
                    then_branch = c () => (float[n, 4] s) {
                        k = Constant<value_float = 2.0>() s = Mul(h, k) },
                    else_branch = d () => (float[n, 4] t) { t = Neg(h) } > },
            else_branch = b () => (float[n, 4] v) { v = Relu(h) } > }"""
    weight = np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32)
    model = sketch(text, {"w": weight})
    onnx.save(model, tmp_path / "m.onnx")
    feed = {"x": np.ones((2, 4), np.float32), "p": np.array(True)}

    made = prepare(tmp_path / "m.onnx")

    expected = ort.InferenceSession(tmp_path / "m.onnx").run(None, feed)
    got = ort.InferenceSession(to_proto(made).SerializeToString()).run(None, feed)
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-6)

"""Sessions: what opens, and what the error says when it does not."""

import gc

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from quant_core.errors import ModelError
from quant_core.model.session import open_session, optimized_graph, run
from tests.models import save_apart


def relu_model(
    op: str = "Relu", domain: str = "", opset: int = 17, ir_version: int = 8
) -> onnx.ModelProto:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 4]) for name in "xy")
    nodes = [
        helper.make_node(op, ["x"], ["a"], domain=domain),
        helper.make_node("Neg", ["a"], ["y"]),
    ]
    opsets = [helper.make_opsetid("", opset)] + ([helper.make_opsetid(domain, 1)] if domain else [])
    return helper.make_model(
        helper.make_graph(nodes, "g", [x], [y]), opset_imports=opsets, ir_version=ir_version
    )


def matmul_model() -> onnx.ModelProto:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 64]) for name in "xy")
    weight = numpy_helper.from_array(np.eye(64, dtype=np.float32), "w")
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("Identity", ["a"], ["y"]),
    ]
    graph = helper.make_graph(nodes, "g", [x], [y], [weight])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_a_session_neither_spins_nor_takes_more_threads_than_asked(tmp_path):
    path = tmp_path / "m.onnx"
    onnx.save(relu_model(), path)

    options = open_session(path, threads=2).get_session_options()

    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (2, 1)


def test_a_path_a_string_and_bytes_open_the_same_model(tmp_path):
    path = tmp_path / "m.onnx"
    onnx.save(relu_model(), path)
    feed = {"x": np.array([[-1, 0, 1, 2]], np.float32)}

    results = [run(open_session(model), feed)[0] for model in (path, str(path), path.read_bytes())]

    for result in results:
        np.testing.assert_array_equal(result, [[0, 0, -1, -2]])


def test_inner_tensors_become_outputs_after_the_models_own():
    session = open_session(relu_model().SerializeToString(), outputs=["a"])

    assert [o.name for o in session.get_outputs()] == ["y", "a"]
    np.testing.assert_array_equal(
        run(session, {"x": np.full((1, 4), 3, np.float32)})[1], np.full((1, 4), 3)
    )


def test_more_outputs_than_one_length_byte_holds_are_exposed():
    name = "a" * 300
    model = relu_model()
    model.graph.node[0].output[0] = model.graph.node[1].input[0] = name

    assert [
        o.name for o in open_session(model.SerializeToString(), outputs=[name]).get_outputs()
    ] == ["y", name]


def test_external_weights_are_found_beside_the_model_with_and_without_more_outputs(
    tmp_path, monkeypatch
):
    path = tmp_path / "m.onnx"
    save_apart(matmul_model(), path, "w.bin")
    monkeypatch.chdir("/")
    feed = {"x": np.ones((2, 64), np.float32)}

    for outputs in ([], ["a"]):
        for result in run(open_session(path, outputs=outputs), feed):
            np.testing.assert_array_equal(result, feed["x"])


def test_external_weights_outside_the_models_folder_are_refused(tmp_path):
    path = tmp_path / "inner" / "m.onnx"
    path.parent.mkdir()
    save_apart(matmul_model(), path, "w.bin")
    (path.parent / "w.bin").rename(tmp_path / "w.bin")
    model = onnx.load(path, load_external_data=False)
    model.graph.initializer[0].external_data[0].value = "../w.bin"
    path.write_bytes(model.SerializeToString())

    with pytest.raises(ModelError, match="xternal data"):
        open_session(path)


@pytest.mark.parametrize(
    ("content", "hint"),
    [
        (b"", "Not an ONNX model, or cut short"),
        (b"hello, this is not a model", "Not an ONNX model, or cut short"),
        (relu_model().SerializeToString()[:-20], "Not an ONNX model, or cut short"),
        (relu_model(opset=99).SerializeToString(), "Convert the model to an opset"),
        (relu_model(ir_version=99).SerializeToString(), "Update onnxruntime"),
        (relu_model("Reluu").SerializeToString(), "Custom operators are never loaded"),
        (
            relu_model("Foo", domain="my.ops").SerializeToString(),
            "Custom operators are never loaded",
        ),
    ],
    ids=["empty", "junk", "truncated", "opset", "ir_version", "unknown operator", "custom domain"],
)
def test_a_model_that_cannot_be_loaded_says_where_and_what_to_do(tmp_path, content, hint):
    path = tmp_path / "bad.onnx"
    path.write_bytes(content)

    with pytest.raises(ModelError) as caught:
        open_session(path)

    assert caught.value.where == str(path)
    assert hint in caught.value.hint
    assert "onnxruntime_src" not in caught.value.problem


@pytest.mark.parametrize(
    "message",
    [
        "Could not find an implementation for Cast(21) node with name 'w_wide'",
        "Exception during initialization: tensor type 21 is not supported",
        "MLDataType for: tensor(int4) is not currently registered or supported",
        "Fatal error: com.microsoft:GatherBlockQuantized(-1) is not a registered function/op",
    ],
)  # what onnxruntime 1.18 to 1.22 say
def test_a_runtime_too_old_for_4_bits_says_so(monkeypatch, message):
    def refuse(*_, **__):
        raise RuntimeError(f"[ONNXRuntimeError] : 9 : NOT_IMPLEMENTED : {message}")

    monkeypatch.setattr(ort, "InferenceSession", refuse)

    with pytest.raises(ModelError) as caught:
        open_session(matmul_model().SerializeToString())

    assert "1.23" in caught.value.hint


def test_missing_external_weights_are_named(tmp_path):
    path = tmp_path / "m.onnx"
    save_apart(matmul_model(), path, "w.bin")
    (tmp_path / "w.bin").unlink()

    with pytest.raises(ModelError, match=r"w\.bin") as caught:
        open_session(path)

    assert "another file" in caught.value.hint


def test_a_missing_file_and_a_folder_have_errors_of_their_own(tmp_path):
    with pytest.raises(ModelError, match="no such file"):
        open_session(tmp_path / "none.onnx")
    with pytest.raises(ModelError, match="is a folder"):
        open_session(tmp_path)


def test_a_feed_that_does_not_fit_is_a_model_error_with_its_shapes():
    session = open_session(relu_model().SerializeToString())

    with pytest.raises(ModelError, match=r"x float32\[1, 5\].*Expected: 4") as caught:
        run(session, {"x": np.zeros((1, 5), np.float32)}, where="sample 3")

    assert caught.value.where == "sample 3"


def test_the_optimized_graph_shows_what_fused():
    model = matmul_model().SerializeToString()

    kept = [node.op_type for node in optimized_graph(model, optimize=False).graph.node]
    fused = [node.op_type for node in optimized_graph(model).graph.node]

    assert kept == ["MatMul", "Identity"]
    assert fused == ["MatMul"]


@pytest.mark.parametrize("outputs", [(), ("a",)])
def test_a_model_in_memory_runs_as_its_bytes_do_after_it_is_gone(outputs):
    """Its weights are not copied, so that the session must keep them alive."""
    proto = matmul_model()
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(64, 64)).astype(np.float32)
    proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, "w"))
    feed = {"x": rng.normal(size=(3, 64)).astype(np.float32)}
    expected = run(open_session(proto.SerializeToString(), outputs=outputs), feed)

    session = open_session(ir.from_proto(proto), outputs=outputs, packed=False)
    del proto
    gc.collect()

    for a, b in zip(expected, run(session, feed), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_model_with_weights_in_a_file_and_in_memory_opens(tmp_path):
    model = ir.from_proto(matmul_model())
    stored = ir.external_data.unload_from_model(model, tmp_path, "w.bin")
    weight = ir.tensor(np.full((64, 64), 0.5, np.float32), name="v")
    value = ir.Value(name="v", const_value=weight, type=ir.TensorType(ir.DataType.FLOAT))
    value.shape = ir.Shape([64, 64])
    stored.graph.register_initializer(value)
    (matmul,) = (node for node in stored.graph if node.op_type == "MatMul")
    added = ir.node("MatMul", [matmul.outputs[0], value])
    stored.graph.insert_after(matmul, added)
    (identity,) = (node for node in stored.graph if node.op_type == "Identity")
    identity.replace_input_with(0, added.outputs[0])

    (got,) = run(open_session(stored), {"x": np.ones((1, 64), np.float32)})

    np.testing.assert_array_equal(got, np.full((1, 64), 32, np.float32))

"""Scan of opset 8, over the samples of a batch, computes the same in the opset it is raised to."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from quant_core.errors import ModelError
from quant_core.model.prepare import prepare
from quant_core.model.session import open_session, run


def batched(lengths: str = "") -> onnx.ModelProto:
    """s' = s W + x, y = s', from the last step to the first, for each sample of a batch."""
    weight = np.random.default_rng(0).standard_normal((3, 3)).astype(np.float32)
    infos = {
        name: helper.make_tensor_value_info(name, TensorProto.FLOAT, [3])
        for name in ("s", "x", "after", "row")
    }
    nodes = [
        helper.make_node("Unsqueeze", ["s"], ["s2"], axes=[0]),
        helper.make_node("MatMul", ["s2", "w"], ["m"]),
        helper.make_node("Squeeze", ["m"], ["m1"], axes=[0]),
        helper.make_node("Add", ["m1", "x"], ["after"]),
        helper.make_node("Identity", ["after"], ["row"]),
    ]
    body = helper.make_graph(
        nodes, "body", [infos["s"], infos["x"]], [infos["after"], infos["row"]],
        [numpy_helper.from_array(weight, "w")],
    )  # fmt: skip
    scan = helper.make_node(
        "Scan", [lengths, "start", "xs"], ["last", "rows"], "scan", body=body,
        num_scan_inputs=1, directions=[1],
    )  # fmt: skip
    sizes = {"start": [2, 3], "xs": [2, 4, 3], "last": [2, 3], "rows": [2, 4, 3], "lengths": [2]}
    faces = {
        name: helper.make_tensor_value_info(name, TensorProto.FLOAT, size)
        for name, size in sizes.items()
    }
    faces["lengths"].type.tensor_type.elem_type = TensorProto.INT64
    inputs = [faces[name] for name in ("start", "xs", *filter(None, [lengths]))]
    graph = helper.make_graph([scan], "old", inputs, [faces["last"], faces["rows"]])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 8)], ir_version=4)


def test_each_sample_of_the_batch_is_scanned(tmp_path):
    path = tmp_path / "m.onnx"
    onnx.save(batched(), path)
    rng = np.random.default_rng(1)
    feed = {"start": rng.standard_normal((2, 3)), "xs": rng.standard_normal((2, 4, 3))}
    feed = {name: array.astype(np.float32) for name, array in feed.items()}

    made = prepare(path)

    assert made.opset_imports == {"": 17}
    for a, b in zip(*(run(open_session(m), feed) for m in (path, made)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_samples_of_different_lengths_are_refused(tmp_path):
    path = tmp_path / "m.onnx"
    onnx.save(batched("lengths"), path)

    with pytest.raises(ModelError, match="sequence_lens"):
        prepare(path)

"""What several graphs of a model hold is stored once, and each graph computes what it did."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from quant_core.model.info import model_info
from quant_core.model.session import open_session, run
from quant_core.model.share import share_weights
from tests.models import save_apart, sketch

RNG = np.random.default_rng(0)
COMMON, OWN = (RNG.normal(size=(32, 32)).astype(np.float32) for _ in range(2))
X = {"x": RNG.normal(size=(4, 32)).astype(np.float32)}
TEXT = "(float[n, 32] x) => (float[n, 32] y) { h = MatMul(x, a) y = MatMul(h, b) }"


def save(folder, name: str, **constants: np.ndarray):
    onnx.save(sketch(TEXT, constants), folder / name)
    return folder / name


def output(path) -> np.ndarray:
    return run(open_session(path), X)[0]


def test_a_weight_that_two_graphs_hold_is_stored_once_whatever_its_name(tmp_path):
    first = save(tmp_path, "first.onnx", a=COMMON, b=OWN)
    second = save(tmp_path, "second.onnx", a=COMMON.T.copy(), b=COMMON)

    size = share_weights([first, second], tmp_path / "out", "both.onnx_data")

    assert size == (tmp_path / "out/both.onnx_data").stat().st_size == COMMON.nbytes
    for path in (first, second):
        written = tmp_path / "out" / path.name
        assert written.stat().st_size < COMMON.nbytes + OWN.nbytes / 2
        np.testing.assert_array_equal(output(written), output(path))
        assert model_info(written).size_bytes == written.stat().st_size + COMMON.nbytes


def test_a_graph_counts_only_its_own_part_of_a_file_that_others_read_too(tmp_path):
    shared = {"a": COMMON, "b": OWN}
    paths = [save(tmp_path, f"{k}.onnx", **shared) for k in range(2)]
    paths.append(save(tmp_path, "2.onnx", a=COMMON, b=COMMON))

    share_weights(paths, tmp_path / "out", "all.onnx_data")

    written = tmp_path / "out/2.onnx"
    assert (tmp_path / "out/all.onnx_data").stat().st_size == 2 * COMMON.nbytes
    assert model_info(written).size_bytes == written.stat().st_size + COMMON.nbytes


def test_four_bit_weights_and_those_of_branches_are_shared(tmp_path):
    pairs = bytes(range(128)) * 16
    integers = helper.make_tensor("q", TensorProto.INT4, [64, 64], pairs, raw=True)
    scale = onnx.numpy_helper.from_array(np.array(0.5, np.float32), "s")
    value = helper.make_tensor_value_info("w", TensorProto.FLOAT, [64, 64])
    nodes = [helper.make_node("DequantizeLinear", ["q", "s"], ["w"])]
    branch = helper.make_graph(nodes, "branch", [], [value], [integers, scale])
    node = helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)
    outer = helper.make_graph(
        [node],
        "outer",
        [helper.make_tensor_value_info("c", TensorProto.BOOL, [])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [64, 64])],
    )
    model = helper.make_model(outer, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    for name in ("a.onnx", "b.onnx"):
        onnx.save(model, tmp_path / name)

    size = share_weights(
        [tmp_path / "a.onnx", tmp_path / "b.onnx"], tmp_path / "out", "q.onnx_data"
    )

    assert size == len(pairs)
    feed = {"c": np.array(True)}
    before, after = (run(open_session(tmp_path / p), feed)[0] for p in ("a.onnx", "out/a.onnx"))
    np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("second", [{"a": OWN.T.copy(), "b": OWN + 1}, None])
def test_nothing_is_written_where_nothing_can_be_shared(tmp_path, second):
    first = save(tmp_path, "first.onnx", a=COMMON, b=OWN)
    other = tmp_path / "second.onnx"
    if second is not None:
        save(tmp_path, "second.onnx", **second)
    else:  # it has external data of its own
        model = sketch(TEXT, {"a": COMMON, "b": OWN})
        save_apart(model, other, "own")

    assert share_weights([first, other], tmp_path / "out", "both") == 0
    assert not (tmp_path / "out").exists()

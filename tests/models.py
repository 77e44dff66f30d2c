"""Models small enough to see through."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def tiny_cnn(opset: int = 17, seed: int = 0) -> onnx.ModelProto:
    """x (n, 3, 8, 8) -> Conv -> Relu -> GlobalAveragePool -> Flatten -> Gemm -> y (n, 10)."""
    rng = np.random.default_rng(seed)
    weights = {
        "w": rng.standard_normal((16, 3, 3, 3), dtype=np.float32),
        "b": np.zeros(16, np.float32),
        "g": rng.standard_normal((16, 10), dtype=np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["c"], "conv"),
        helper.make_node("Relu", ["c"], ["r"], "relu"),
        helper.make_node("GlobalAveragePool", ["r"], ["p"], "pool"),
        helper.make_node("Flatten", ["p"], ["f"], "flatten"),
        helper.make_node("Gemm", ["f", "g"], ["y"], "gemm"),
    ]
    return one_graph(nodes, weights, opset, output=("n", 10))


def one_graph(
    nodes: Sequence[onnx.NodeProto],
    weights: Mapping[str, np.ndarray],
    opset: int = 17,
    *,
    input: Sequence[int | str] = ("n", 3, 8, 8),
    output: Sequence[int | str | None] = ("n", 3, None, None),
) -> onnx.ModelProto:
    """A model that computes y from x by these nodes, in float32."""
    graph = helper.make_graph(
        list(nodes),
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(input))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, list(output))],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)

"""Models small enough to see through."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper, parser

from quant_core.model.normalize import normalize


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


def save_apart(model: onnx.ModelProto, path: str | Path, data: str) -> None:
    """Write the model, with all its weights in a file of that name beside it."""
    onnx.save(model, path, save_as_external_data=True, location=data, size_threshold=0)


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


def sketch(
    text: str,
    constants: Mapping[str, np.ndarray] | None = None,
    opset: int = 17,
    ir_version: int = 8,
) -> onnx.ModelProto:
    """A model written in ONNX's text form, with these constants.

    For example `(float[n, 3] x) => (float[n, 4] y) { y = MatMul(x, w) }`.

    Every node is named after its first output.
    """
    graph = parser.parse_graph(f"sketch {text}")
    _name_nodes(graph)
    given = (constants or {}).items()
    graph.initializer.extend(
        numpy_helper.from_array(np.asarray(array), name) for name, array in given
    )
    domains = {node.domain for node in graph.node if node.domain}
    imports = [
        helper.make_opsetid("", opset),
        *(helper.make_opsetid(domain, 1) for domain in sorted(domains)),
    ]
    return helper.make_model(graph, opset_imports=imports, ir_version=ir_version)


def _name_nodes(graph: onnx.GraphProto) -> None:
    for node in graph.node:
        node.name = next(filter(None, node.output))
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _name_nodes(attribute.g)


def random_feed(model: onnx.ModelProto, seed: int = 0, n: int = 4) -> dict[str, np.ndarray]:
    """Standard normal floats, or integers from 0 to 4, for every input.

    Sizes that the model leaves open are `n`.
    """
    rng = np.random.default_rng(seed)
    constants = {tensor.name for tensor in model.graph.initializer}
    return {
        i.name: _random(rng, i.type.tensor_type, n)
        for i in model.graph.input
        if i.name not in constants
    }


def _random(rng: np.random.Generator, type_: onnx.TypeProto.Tensor, n: int) -> np.ndarray:
    dtype = helper.tensor_dtype_to_np_dtype(type_.elem_type)
    shape = [d.dim_value or n for d in type_.shape.dim]
    return (rng.standard_normal(shape) if dtype.kind == "f" else rng.integers(0, 5, shape)).astype(
        dtype
    )


def normalized(proto: onnx.ModelProto) -> ir.Model:
    """The model as plans are made of it."""
    model = ir.from_proto(proto)
    normalize(model)
    return model

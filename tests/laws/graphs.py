"""Random models as quantizers meet them: shared weights, tables, branches, loops, several types."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import onnx
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from tests.laws.sketches import ANY, BATCH, IMAGES, Shape, Sketch

STEPS = 5  # positions of the indices
ROWS = 9  # of a table
MOST = 4000  # elements of a tensor that more nodes read
TYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "double": TensorProto.DOUBLE,
}
Feed = dict[str, np.ndarray]


@dataclass
class Weighted(Sketch):
    """A graph whose weights keep the size of what they multiply, and are read again and again.

    wide    whether tensors may have 16 channels and more, as blocks of 4-bit weights need
    parent  the graph around this one
    """

    opsets: tuple[int, int] = (13, 23)
    wide: bool = False
    parent: Weighted | None = None
    inputs: dict[str, Any] = field(default_factory=dict)  # name -> array, beside x

    def numbers(self, *shape: int) -> str:
        known = [n for n, a in self.constants.items() if a.shape == shape and a.dtype == np.float32]
        if known and self.draw(st.booleans()):
            return str(self.draw(st.sampled_from(known)))
        array = self.rng.standard_normal(shape) / np.sqrt(max(1, prod(shape[1:])))
        kind = self.draw(st.sampled_from(["plain"] * 4 + ["zeros", "sizes", "positive"]))
        if kind == "zeros" and array.ndim > 1:
            array[self.rng.random(shape[0]) < 0.5] = 0
        elif kind == "sizes" and array.ndim > 1:
            factors = 10.0 ** self.rng.integers(-3, 1, shape[0])
            array *= factors.reshape(-1, *[1] * (array.ndim - 1))
        elif kind == "positive":
            array = np.abs(array)
        return self.constant(array.astype(np.float32))

    def constant(self, array: np.ndarray) -> str:
        if self.parent is not None and self.constants is self.parent.constants:
            return self.parent.constant(array)
        return super().constant(array)

    def width(self, most: int) -> int:
        if self.wide and self.draw(st.booleans()):
            return int(self.draw(st.sampled_from([16, 24, 32])))
        return super().width(most)

    def inside(self, prefix: str) -> Weighted:
        """An empty graph for a branch or a body, whose constants are its own or those around."""
        constants = self.constants if self.draw(st.booleans()) else {}
        return Weighted(
            self.draw, self.rng, {}, prefix=prefix, constants=constants, wide=self.wide, parent=self
        )


def _step_inside(s: Weighted, x: str, shape: Shape) -> str:
    """Some nodes of a body that keep the shape."""
    width = shape[-1]
    after = s.add("MatMul", [x, s.numbers(width, width)], shape)
    if s.draw(st.booleans()):
        after = s.add("Add", [after, s.numbers(width)], shape)
    return s.add("Tanh", [after], shape)


def _subgraph(s: Weighted, inputs: list[Any], outputs: list[str]) -> onnx.GraphProto:
    own = {} if s.parent is not None and s.constants is s.parent.constants else s.constants
    types = [TensorProto.BOOL if name.endswith("go") else TensorProto.FLOAT for name in outputs]
    infos = [helper.make_tensor_value_info(n, t, None) for n, t in zip(outputs, types, strict=True)]
    tensors = [numpy_helper.from_array(array, name) for name, array in own.items()]
    return helper.make_graph(s.nodes, "inside", inputs, infos, tensors)


def _branch(s: Weighted, x: str) -> None:
    """If, whose branches may have values of the same names."""
    s.inputs.setdefault("flag", np.array(bool(s.draw(st.booleans()))))
    shape, same = s.shapes[x], s.draw(st.booleans())
    graphs = []
    for kind in ("then", "else"):
        inner = s.inside(f"{len(s.nodes)}{'in' if same else kind}_")
        graphs.append(_subgraph(inner, [], [_step_inside(inner, x, shape)]))
    s.add("If", ["flag"], shape, then_branch=graphs[0], else_branch=graphs[1])


def _loop(s: Weighted, x: str) -> None:
    """Loop over a state."""
    inner, name = s.inside(f"{len(s.nodes)}body_"), f"{len(s.nodes)}"
    inputs = [
        helper.make_tensor_value_info(f"{name}i", TensorProto.INT64, []),
        helper.make_tensor_value_info(f"{name}go_in", TensorProto.BOOL, []),
        helper.make_tensor_value_info(f"{name}state", TensorProto.FLOAT, None),
    ]
    after = _step_inside(inner, f"{name}state", s.shapes[x])
    inner.nodes.append(helper.make_node("Identity", [f"{name}go_in"], [f"{name}go"], f"{name}go"))
    body = _subgraph(inner, inputs, [f"{name}go", after])
    s.add("Loop", [s.constant(np.array(2)), "", x], s.shapes[x], body=body)


def _scan(s: Weighted, x: str) -> None:
    """Scan along axis 1, from the largest values on."""
    if len(s.shapes[x]) != 3:
        return
    s.older_than(18)  # which has axes as an input
    shape, name = s.shapes[x], f"{len(s.nodes)}"
    state_shape = (shape[0], shape[2])
    start = s.add("ReduceMax", [x], state_shape, axes=[1], keepdims=0)
    inner = s.inside(f"{name}scan_")
    inputs = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, None)
        for n in (f"{name}state", f"{name}row")
    ]
    both = inner.add("Add", [f"{name}state", f"{name}row"], state_shape)
    after = _step_inside(inner, both, state_shape)
    row = inner.add("Identity", [after], state_shape)
    body = _subgraph(inner, inputs, [after, row])
    last, rows = f"{name}last", f"{name}rows"
    axes = {"scan_input_axes": [1], "scan_output_axes": [1], "num_scan_inputs": 1}
    node = helper.make_node("Scan", [start, x], [last, rows], f"{name}_Scan", body=body, **axes)
    s.nodes.append(node)
    s.shapes |= {last: state_shape, rows: shape}


def _lookup(s: Weighted, x: str) -> None:
    """Rows of a table, which may be a weight of products too."""
    ids = s.rng.integers(-ROWS, ROWS, (BATCH, STEPS))
    s.inputs.setdefault("ids", ids)
    table = s.numbers(ROWS, s.shapes[x][-1])
    s.add("Gather", [table, "ids"], (BATCH, STEPS, s.shapes[x][-1]))


def _tied(s: Weighted, x: str) -> None:
    """A product with a weight that lies transposed."""
    *rows, width = s.shapes[x]
    weight = s.numbers(s.draw(st.sampled_from([ROWS, width])), width)
    outputs = s.constants[weight].shape[0]
    if len(rows) == 1 and s.draw(st.booleans()):
        s.add("Gemm", [x, weight], (*rows, outputs), transB=1)
        return
    turned = s.add("Transpose", [weight], (width, outputs), perm=[1, 0])
    del s.shapes[turned]  # no batch
    s.add("MatMul", [x, turned], (*rows, outputs))


def _layer_norm(s: Weighted, x: str) -> None:
    s.newer_than(17)
    width = s.shapes[x][-1]
    s.add("LayerNormalization", [x, s.numbers(width), s.numbers(width)], s.shapes[x])


def _recurrent(s: Weighted, x: str) -> None:
    """The last state of a recurrent network over axis 1."""
    if len(s.shapes[x]) != 3:
        return
    s.older_than(22)
    n, t, width = s.shapes[x]
    op_type, gates = s.draw(st.sampled_from([("LSTM", 4), ("GRU", 3), ("RNN", 1)]))
    hidden = s.width(4)
    turned = s.add("Transpose", [x], (t, n, width), perm=[1, 0, 2])
    del s.shapes[turned]
    weights = [s.numbers(1, gates * hidden, width), s.numbers(1, gates * hidden, hidden)]
    name = f"{s.prefix}v{len(s.nodes)}"
    outputs = ["", f"{name}h"]
    node = helper.make_node(
        op_type, [turned, *weights], outputs, f"{name}_{op_type}", hidden_size=hidden
    )
    s.nodes.append(node)
    s.add("Squeeze", [f"{name}h", s.constant(np.array([0]))], (n, hidden))


def _tanh(s: Weighted, x: str) -> None:
    s.add("Tanh", [x], s.shapes[x])


INNER = (_branch, _loop, _scan, _lookup, _tied, _layer_norm, _recurrent, _tanh)


@st.composite
def graphs(draw: Any) -> tuple[onnx.ModelProto, Feed]:
    """A model of up to ten steps in one of three float types, and a feed."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    is_image, wide = draw(st.booleans()), draw(st.booleans())
    channels = draw(st.sampled_from([3, 16, 32] if wide else [1, 2, 3, 4]))
    shape = (BATCH, channels, 4, 5) if is_image else (BATCH, STEPS, channels)
    sketch = Weighted(draw, rng, {"x": shape}, wide=wide)
    for _ in range(draw(st.integers(1, 10))):
        newest = [list(sketch.shapes)[-1]] * 4
        x = draw(st.sampled_from([*newest, *sketch.shapes]))
        if prod(sketch.shapes[x]) > MOST:
            continue
        steps = ANY + INNER * 2 + (IMAGES * 3 if len(sketch.shapes[x]) == 4 else ())
        draw(st.sampled_from(steps))(sketch, x)
    made = [name for name in sketch.shapes if name != "x"]
    if not made or draw(st.integers(0, 9)):
        _tied(sketch, (made or ["x"])[-1])
        made = [name for name in sketch.shapes if name != "x"]
    extra = draw(st.lists(st.sampled_from(made), max_size=2))
    outputs = list(dict.fromkeys([made[-1], *extra]))
    dtype = draw(st.sampled_from(["float32"] * 4 + ["float16", "double"]))
    feed = {"x": rng.standard_normal(shape).astype(np.float32), **sketch.inputs}
    model = _model(sketch, feed, outputs, draw(st.integers(*sketch.opsets)))
    _add_what_nobody_reads(sketch, model)
    if dtype != "float32":
        _convert(model.graph, TYPES[dtype])
        feed["x"] = feed["x"].astype(dtype)
    return model, feed


def _model(s: Weighted, feed: Feed, outputs: list[str], opset: int) -> onnx.ModelProto:
    inputs = []
    for name, array in feed.items():
        sizes = ["n", *array.shape[1:]] if array.ndim else []
        kind = helper.np_dtype_to_tensor_dtype(array.dtype)
        inputs.append(helper.make_tensor_value_info(name, kind, sizes))
    infos = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", *[None] * (len(shape) - 1)])
        for name, shape in ((name, s.shapes[name]) for name in outputs)
    ]
    tensors = [numpy_helper.from_array(array, name) for name, array in s.constants.items()]
    graph = helper.make_graph(s.nodes, "random", inputs, infos, tensors)
    imports = [helper.make_opsetid("", opset)]
    model = helper.make_model(graph, opset_imports=imports)
    model.ir_version = helper.find_min_ir_version_for(imports)
    return model


def _add_what_nobody_reads(s: Weighted, model: onnx.ModelProto) -> None:
    """Sometimes a node, an equal weight and a doc string that change nothing."""
    if s.draw(st.booleans()):
        model.graph.node.append(helper.make_node("Neg", ["x"], ["nobody_reads"], "dead"))
        model.graph.initializer.append(numpy_helper.from_array(np.ones((4, 4)), "unread"))
        model.doc_string = model.graph.doc_string = "A model"
        helper.set_model_props(model, {"author": "nobody"})


def _convert(graph: onnx.GraphProto, kind: int) -> None:
    """Edit in place: all floats are of that type, but the scales of Resize."""
    scales = {node.input[2] for node in graph.node if node.op_type == "Resize"}
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    for info in (*graph.input, *graph.output):
        if info.type.tensor_type.elem_type == TensorProto.FLOAT:
            info.type.tensor_type.elem_type = kind
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and tensor.name not in scales:
            array = numpy_helper.to_array(tensor).astype(dtype)
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _convert(attribute.g, kind)

"""Random graphs: each step adds a node, or a few, to what is there."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import onnx
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

BATCH = 2  # the model says "n"
Shape = tuple[int, ...]


@dataclass
class Sketch:
    """A graph that grows by random nodes, and the shape of every value, BATCH along axis 0.

    is_open  whether the model leaves the height and width of its input open too
    prefix   of the names that it gives
    opsets   that know every node so far, the first and the last
    """

    draw: Any
    rng: np.random.Generator
    shapes: dict[str, Shape]
    is_open: bool = False
    prefix: str = ""
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    outputs: list[str] = field(default_factory=list)
    opsets: tuple[int, int] = (17, 17)

    def newer_than(self, opset: int) -> None:
        self.opsets = (max(self.opsets[0], opset), self.opsets[1])

    def older_than(self, opset: int) -> None:
        self.opsets = (self.opsets[0], min(self.opsets[1], opset - 1))

    def constant(self, array: np.ndarray) -> str:
        name = f"{self.prefix}c{len(self.constants)}"
        self.constants[name] = np.asarray(array)
        return name

    def numbers(self, *shape: int) -> str:
        """A float32 constant from -2 to 2, sometimes positive, sometimes with a zero."""
        array = self.rng.uniform(0.5, 2, shape) * self.rng.choice([-1, 1], shape)
        if self.draw(st.booleans()):
            array = np.abs(array)
        if array.size and self.draw(st.integers(0, 9)) == 0:
            array.flat[0] = 0
        return self.constant(array.astype(np.float32))

    def width(self, most: int) -> int:
        """How many channels a new tensor has."""
        return int(self.draw(st.integers(1, most)))

    def add(self, op_type: str, inputs: list[str], shape: Shape, **attributes: Any) -> str:
        name = f"{self.prefix}v{len(self.nodes)}"
        self.nodes.append(
            helper.make_node(op_type, inputs, [name], f"{name}_{op_type}", **attributes)
        )
        self.shapes[name] = shape
        return name

    def model(self) -> onnx.ModelProto:
        def info(name: str) -> onnx.ValueInfoProto:
            if name != "x":
                shape: list[Any] = [None] * len(self.shapes[name])
            else:
                _, channels, *sizes = self.shapes[name]
                shape = ["n", channels, *(["h", "w"][-len(sizes) :] if self.is_open else sizes)]
            return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

        made = helper.make_graph(
            self.nodes, "sketch", [info("x")], [info(name) for name in self.outputs],
            [numpy_helper.from_array(array, name) for name, array in self.constants.items()],
        )  # fmt: skip
        return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def _arithmetic(s: Sketch, x: str) -> None:
    shape = s.shapes[x]
    kinds: list[Shape] = [
        (),
        (1,),
        (1,) * len(shape),
        (1, *shape[1:2], *[1] * (len(shape) - 2)),
    ]
    kinds += [shape[1:2] + (1,) * (len(shape) - 2), shape[-1:]]
    c = s.numbers(*s.draw(st.sampled_from(kinds)))
    op_type = s.draw(st.sampled_from(["Mul", "Add", "Sub", "Div"]))
    if op_type == "Div" and not s.constants[c].all():
        op_type = "Mul"
    first = op_type != "Div" and s.draw(st.booleans())
    s.add(op_type, [c, x] if first else [x, c], shape)


def _norm(s: Sketch, x: str) -> None:
    channels = s.shapes[x][1]
    inputs = [x, *(s.numbers(channels) for _ in range(3)), ""]
    inputs[4] = s.constant(s.rng.uniform(0.5, 2, channels).astype(np.float32))
    s.add("BatchNormalization", inputs, s.shapes[x])


def _unary(s: Sketch, x: str) -> None:
    op_type = s.draw(
        st.sampled_from(["Relu", "LeakyRelu", "Sigmoid", "Identity", "Neg", "HardSigmoid"])
    )
    s.add(op_type, [x], s.shapes[x])


def _bounds(s: Sketch, x: str) -> None:
    """One to three bounds in a row, and sometimes x by what they leave of it."""
    shape, y = s.shapes[x], x
    for _ in range(s.draw(st.integers(1, 3))):
        op_type = s.draw(st.sampled_from(["Relu", "Max", "Min", "Clip"]))
        numbers = [s.constant(np.array(n, np.float32)) for n in sorted(s.rng.uniform(-1, 2, 2))]
        if s.draw(st.booleans()):
            numbers[0] = s.constant(np.zeros(s.draw(st.sampled_from([(), (1,)])), np.float32))
        if op_type == "Clip":
            zero, high = s.constant(np.float32(0)), s.constant(np.float32(s.rng.uniform(0.5, 3)))
            y = s.add("Clip", [y, zero, high], shape)
        else:
            y = s.add(op_type, [y, numbers[0]] if op_type != "Relu" else [y], shape)
    if s.draw(st.booleans()):
        s.add("Mul", [x, y], shape)


def _gelu(s: Sketch, x: str) -> None:
    """Its three factors, two of them multiplied first."""
    shape = s.shapes[x]
    root, half, one = (s.constant(np.array(n, np.float32)) for n in (0.5**0.5, 0.5, 1))
    e = s.add("Erf", [s.add("Mul", [x, root], shape)], shape)
    factors = [s.add("Add", [one, e], shape), x, half]
    a, b, c = s.draw(st.permutations(factors))
    s.add("Mul", [s.add("Mul", [a, b], shape), c], shape)


def _row_norm(s: Sketch, x: str) -> None:
    """Rows over their root mean square, less their mean first or not."""
    s.older_than(18)  # which has axes as an input
    shape = s.shapes[x]
    row = (*shape[:-1], 1)
    if s.draw(st.booleans()):
        x = s.add("Sub", [x, s.add("ReduceMean", [x], row, axes=[-1])], shape)
    mean = s.add("ReduceMean", [s.add("Mul", [x, x], shape)], row, axes=[-1])
    epsilon = s.constant(np.array(s.rng.uniform(0.1, 1), np.float32))
    root = s.add("Sqrt", [s.add("Add", [mean, epsilon], row)], row)
    if s.draw(st.booleans()):
        y = s.add("Div", [x, root], shape)
    else:
        y = s.add("Mul", [x, s.add("Reciprocal", [root], row)], shape)
    if s.draw(st.booleans()):
        s.add("Mul", [y, s.numbers(shape[-1])], shape)


def _prelu(s: Sketch, x: str) -> None:
    shape = s.shapes[x]
    s.add("PRelu", [x, s.numbers(shape[1], *[1] * (len(shape) - 2))], shape)


def _conv(s: Sketch, x: str) -> None:
    """Over one axis or over images."""
    _, channels, *sizes = s.shapes[x]
    axes = len(sizes)
    kernel = [s.draw(st.integers(1, min(3, n))) for n in sizes]
    pads = [s.draw(st.integers(0, k - 1)) for k in (*kernel, *kernel)]
    strides = [s.draw(st.integers(1, 2)) for _ in sizes]
    group = s.draw(st.sampled_from(sorted({1, channels})))
    outputs = group * s.width(3)
    inputs = [x, s.numbers(outputs, channels // group, *kernel)]
    if s.draw(st.booleans()):
        inputs.append(s.numbers(outputs))
    sizes = [
        (n + a + b - k) // stride + 1
        for n, a, b, k, stride in zip(sizes, pads[:axes], pads[axes:], kernel, strides, strict=True)
    ]
    s.add(
        "Conv",
        inputs,
        (BATCH, outputs, *sizes),
        kernel_shape=kernel,
        pads=pads,
        strides=strides,
        group=group,
    )


def _parallel(s: Sketch, x: str) -> None:
    """Convs of one tensor that are added, with a norm of it or itself, as in RepVGG."""
    n, c, h, w = s.shapes[x]
    group = s.draw(st.sampled_from(sorted({1, c})))
    stride = s.draw(st.integers(1, 2))
    shape = (n, c, (h - 1) // stride + 1, (w - 1) // stride + 1)
    kernels = s.draw(st.lists(st.sampled_from([1, 3]), min_size=2, max_size=3))
    terms = []
    for k in kernels:
        pads, weight = [k // 2] * 4, s.numbers(c, c // group, k, k)
        terms.append(
            s.add("Conv", [x, weight], shape, pads=pads, strides=[stride] * 2, group=group)
        )
    if stride == 1 and s.draw(st.booleans()):
        if s.draw(st.booleans()):
            _norm(s, x)
        terms.append(list(s.shapes)[-1] if s.shapes[list(s.shapes)[-1]] == shape else x)
    total = terms[0]
    for term in terms[1:]:
        total = s.add("Add", [total, term], shape)


def _softmax(s: Sketch, x: str) -> None:
    axis = s.draw(st.integers(1, len(s.shapes[x]) - 1))
    s.add("Softmax", [x], s.shapes[x], axis=axis)


def _transposed_conv(s: Sketch, x: str) -> None:
    _, channels, h, w = s.shapes[x]
    group = s.draw(st.sampled_from(sorted({1, channels})))
    outputs = s.draw(st.integers(1, 2))
    inputs = [x, s.numbers(channels, outputs, 2, 2)]
    if s.draw(st.booleans()):
        inputs.append(s.numbers(outputs * group))
    stride = s.draw(st.integers(1, 2))
    shape = (BATCH, outputs * group, (h - 1) * stride + 2, (w - 1) * stride + 2)
    s.add("ConvTranspose", inputs, shape, kernel_shape=[2, 2], strides=[stride] * 2, group=group)


def _pool(s: Sketch, x: str) -> None:
    """Over one axis or over images."""
    n, c, *sizes = s.shapes[x]
    op_type = s.draw(
        st.sampled_from(["MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"])
    )
    if op_type.startswith("Global"):
        s.add(op_type, [x], (n, c, *[1] * len(sizes)))
        return
    pad = s.draw(st.integers(0, 1))
    attributes = (
        {"count_include_pad": s.draw(st.integers(0, 1))} if op_type == "AveragePool" else {}
    )
    kernel = [min(2, size + 2 * pad) for size in sizes]
    pads = [pad if k == 2 else 0 for k in kernel]
    sizes = [a + 2 * p - k + 1 for a, p, k in zip(sizes, pads, kernel, strict=True)]
    s.add(op_type, [x], (n, c, *sizes), kernel_shape=kernel, pads=pads * 2, **attributes)


def _pad(s: Sketch, x: str) -> None:
    n, c, h, w = s.shapes[x]
    more = s.draw(st.integers(0, 1))
    pads = s.constant(np.array([0, 0, more, 0, 0, 0, 0, more]))
    mode = s.draw(st.sampled_from(["constant", "edge"]))
    filler = [s.numbers()] if mode == "constant" and s.draw(st.booleans()) else []
    s.add("Pad", [x, pads, *filler], (n, c, h + more, w + more), mode=mode)


def _resize(s: Sketch, x: str) -> None:
    n, c, h, w = s.shapes[x]
    scales = s.constant(np.array([1, 1, 2, 2], np.float32))
    mode = s.draw(st.sampled_from(["nearest", "linear", "cubic"]))
    s.add("Resize", [x, "", scales], (n, c, 2 * h, 2 * w), mode=mode)


def _dense(s: Sketch, x: str) -> None:
    *rows, width = s.shapes[x]
    outputs = s.width(4)
    if len(rows) == 1 and s.draw(st.booleans()):
        turned = s.draw(st.integers(0, 1))
        inputs = [x, s.numbers(*((outputs, width) if turned else (width, outputs)))]
        if s.draw(st.booleans()):
            inputs.append(s.numbers(*s.draw(st.sampled_from([(outputs,), (1, outputs), (1,), ()]))))
        alpha, beta = (s.draw(st.sampled_from([1.0, 0.5])) for _ in range(2))
        s.add("Gemm", inputs, (*rows, outputs), transB=turned, alpha=alpha, beta=beta)
    else:
        s.add("MatMul", [x, s.numbers(width, outputs)], (*rows, outputs))


def _again(s: Sketch, x: str) -> None:
    """A node of what is there, once more, and both added."""
    node = s.draw(st.sampled_from(s.nodes)) if s.nodes else None
    if node is not None and len(node.output) == 1 and node.output[0] in s.shapes:  # has a batch
        shape = s.shapes[node.output[0]]
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        twin = s.add(node.op_type, list(node.input), shape, **attributes)
        s.add("Add", [node.output[0], twin], shape)


def _pair(s: Sketch, x: str) -> None:
    """With another tensor of the same shape, or of one entry along some axes."""
    others = [v for v, shape in s.shapes.items() if _meets(shape, s.shapes[x])]
    op_type = s.draw(st.sampled_from(["Add", "Mul", "Sub", "Sum"]))
    s.add(op_type, [x, s.draw(st.sampled_from(others))], s.shapes[x])


def _meets(shape: Shape, other: Shape) -> bool:
    return len(shape) == len(other) and all(a in (1, b) for a, b in zip(shape, other, strict=True))


def _concat(s: Sketch, x: str) -> None:
    axis = s.draw(st.integers(1, len(s.shapes[x]) - 1))
    shape = list(s.shapes[x])
    others = [v for v, o in s.shapes.items() if _joins(o, tuple(shape), axis)]
    other = s.draw(st.sampled_from(others))
    shape[axis] += s.shapes[other][axis]
    s.add("Concat", [x, other], tuple(shape), axis=axis)


def _joins(shape: Shape, other: Shape, axis: int) -> bool:
    rest, other_rest = (n[:axis] + n[axis + 1 :] for n in (shape, other))
    return len(shape) == len(other) and rest == other_rest


def _split(s: Sketch, x: str) -> None:
    shape = list(s.shapes[x])
    if shape[1] < 2:
        return
    name = f"{s.prefix}v{len(s.nodes)}"
    sizes = [1, shape[1] - 1]
    outputs = [f"{name}a", f"{name}b"]
    inputs = [x, s.constant(np.array(sizes))]
    s.nodes.append(helper.make_node("Split", inputs, outputs, f"{name}_Split", axis=1))
    for output, size in zip(outputs, sizes, strict=True):
        s.shapes[output] = (shape[0], size, *shape[2:])


def _move(s: Sketch, x: str) -> None:
    shape = s.shapes[x]
    if len(shape) > 2 and s.draw(st.booleans()):
        if s.draw(st.booleans()):
            s.add("Flatten", [x], (BATCH, prod(shape[1:])), axis=1)
        else:
            target = s.constant(np.array([0, shape[1], -1]))
            s.add("Reshape", [x, target], (BATCH, shape[1], prod(shape[2:])))
    else:
        order = [0, *s.draw(st.permutations(range(1, len(shape))))]
        s.add("Transpose", [x], tuple(shape[i] for i in order), perm=order)


def _choose(s: Sketch, x: str) -> None:
    """One row or two along an axis, which goes if a single number chooses it."""
    shape = list(s.shapes[x])
    axis = s.draw(st.integers(1, len(shape) - 1))
    first, size = s.draw(st.integers(-1, shape[axis] - 1)), shape[axis]
    kind = s.draw(st.sampled_from(["number", "list", "slice"]))
    if kind == "slice":
        start = first % size
        bounds = [s.constant(np.array([n])) for n in (start, start + 1, axis)]
        shape[axis] = 1
        s.add("Slice", [x, *bounds], tuple(shape))
        return
    rows = np.array(first) if kind == "number" else np.array([first] * s.draw(st.integers(1, 2)))
    shape[axis : axis + 1] = rows.shape
    if len(shape) > 1:
        s.add("Gather", [x, s.constant(rows)], tuple(shape), axis=axis)


ANY = (_norm, _unary, _bounds, _gelu, _row_norm, _prelu, _pair, _again, _concat, _split, _move,
       _dense, _dense, _softmax, _choose, *[_arithmetic] * 3)  # fmt: skip
LINES = (_conv, _conv, _pool)
IMAGES = (_conv, _conv, _conv, _parallel, _transposed_conv, _pool, _pad, _resize)


@st.composite
def sketches(draw: Any) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """A model of up to 12 nodes, mostly one after the other, and a feed."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    axes = draw(st.sampled_from([1, 2, 2]))
    shape = (BATCH, draw(st.integers(1, 4)), *(draw(st.integers(1, 5)) for _ in range(axes)))
    sketch = Sketch(draw, rng, {"x": shape}, draw(st.booleans()))
    for _ in range(draw(st.integers(1, 12))):
        newest = [list(sketch.shapes)[-1]] * 4
        x = draw(st.sampled_from([*newest, *sketch.shapes]))
        if prod(sketch.shapes[x]) > 2000:
            continue
        steps = ANY + {3: LINES * 2, 4: IMAGES * 2}.get(len(sketch.shapes[x]), ())
        draw(st.sampled_from(steps))(sketch, x)
    made = [v for v in sketch.shapes if v != "x"]
    if not made:
        _unary(sketch, "x")
        made = ["v0"]
    extra = draw(st.lists(st.sampled_from(made), max_size=2))
    sketch.outputs = list(dict.fromkeys([made[-1], *extra]))
    return sketch.model(), {"x": rng.standard_normal(shape).astype(np.float32)}

"""A model in float16, bfloat16 or double as one that computes the same in float32.

Plans, kernels and statistics know float32 only. onnxruntime's CPU provider has few kernels for
float16 and bfloat16, and computes most of such a model in float32 anyway, with casts in between.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes

from quant_core.model import graph
from quant_core.model.carried import callers_of, is_multiplied
from quant_core.model.constants import tensor_of

FLOAT32 = ir.DataType.FLOAT
OTHERS = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)
# Attributes that hold a type as a number.
TYPE_ATTRIBUTES = ("to", "dtype", "output_datatype", "output_dtype", "stash_type")
COMPUTED_FROM = "quantmill.computed_from"  # key of what `to_float32` converted, in the metadata


def to_float32(model: ir.Model) -> frozenset[ir.DataType]:
    """Edit the model in place; returns the types that were converted, none if no weight has one.

    Inputs and outputs keep their types:

        x (float16) -> MatMul -> y (float16)
      = x (float16) -> Cast -> MatMul -> Cast -> y (float16)

    1. Local functions are inlined.
    2. Constants, types that attributes name, and types of inner values become float32.
    3. Casts follow the model's inputs and go before its outputs. Sequences and optionals of such a
       type are not converted: a model that takes or gives one stays as it is.
    """
    types = _weight_types(model)
    faces = (*model.graph.inputs, *model.graph.outputs)
    if not types or any(_holds_others(value) for value in faces):
        return frozenset()
    faces = (*model.graph.inputs, *_inlined_outputs(model))  # 1
    kept = {v: v.dtype for v in faces if v.dtype in types and v.const_value is None}
    for value in faces:
        if value.dtype in types and value.is_graph_input() and value not in kept:
            model.graph.inputs.remove(value)  # an input with a default value becomes a constant
    for inside in graph.graphs_of(model):
        for value in _values(inside):
            _convert_value(value, types)  # 2
        for node in inside:
            _convert_attributes(node, types)
    for value, dtype in kept.items():  # 3
        assert dtype is not None
        if value.is_graph_input():
            _cast_input(model.graph, value, dtype)
        elif value.is_graph_output():
            _cast_output(model.graph, value, dtype)
    names = sorted(kind.name.lower() for kind in types)
    model.metadata_props[COMPUTED_FROM] = ", ".join(names)
    return types


def _inlined_outputs(model: ir.Model) -> list[ir.Value]:
    """The model's outputs once its local functions are inlined, with the types and shapes that they
    had: what is written inside a function may have none.
    """
    before = list(model.graph.outputs)
    passes.InlinePass()(model)
    for old, new in zip(before, model.graph.outputs, strict=True):
        new.type, new.shape = old.type, old.shape
    return list(model.graph.outputs)


def stores_float16(model: ir.Model) -> bool:
    """Whether the model's file held weights in 16 bits, which those that stay float keep."""
    return "16" in model.metadata_props.get(COMPUTED_FROM, "")


def _weight_types(model: ir.Model) -> frozenset[ir.DataType]:
    """The types other than float32 of constants that are weights."""
    found = set()
    callers = callers_of(model)
    inside_functions = (f.graph for f in model.functions.values())
    for inside in (*graph.graphs_of(model), *inside_functions):
        for value in _values(inside):
            tensor = tensor_of(value)
            if tensor is None or tensor.dtype not in OTHERS or len(tensor.shape) < 2:
                continue
            readers = graph.consumers(value)
            if any(_may_multiply(n) for n in readers) or is_multiplied(value, callers):
                found.add(tensor.dtype)
        found.update(t.dtype for t in _handed_over(inside) if t.dtype in OTHERS)
    return frozenset(found)


def _may_multiply(reader: ir.Node) -> bool:
    """Whether it has weights, or hides what does."""
    return reader.op_type in graph.WEIGHTED or reader.op_type == "Cast" or bool(reader.domain)


def _handed_over(inside: ir.Graph) -> Iterator[ir.TensorProtocol]:
    """The matrices that nodes hand as attributes to operators of other domains, or to functions."""
    for node in inside:
        for attribute in node.attributes.values() if node.domain else ():
            if attribute.type == ir.AttributeType.TENSOR and not attribute.is_ref():
                tensor = attribute.as_tensor()
                if len(tensor.shape) > 1:
                    yield tensor


def _holds_others(value: ir.Value) -> bool:
    """Whether the value is a sequence or optional of floats that are not float32."""
    is_tensor = value.type is None or isinstance(value.type, ir.TensorType)
    return not is_tensor and value.dtype in OTHERS


def _values(inside: ir.Graph) -> Iterator[ir.Value]:
    yield from inside.initializers.values()
    yield from (v for v in inside.inputs if v.name not in inside.initializers)
    for node in inside:
        yield from node.outputs


def _convert_value(value: ir.Value, types: frozenset[ir.DataType]) -> None:
    """Edit in place: a value of such a type is in float32, and so is the tensor behind it."""
    if value.const_value is not None and value.const_value.dtype in types:
        value.const_value = _converted(value.const_value)
    if value.dtype in types:
        if isinstance(value.type, ir.TensorType):
            value.type = ir.TensorType(FLOAT32)
        else:
            value.type = None  # onnxruntime infers it again
            value.shape = None


def _convert_attributes(node: ir.Node, types: frozenset[ir.DataType]) -> None:
    for name, attribute in list(node.attributes.items()):
        if attribute.type == ir.AttributeType.TENSOR:
            tensor = attribute.as_tensor()
            if tensor.dtype in types:
                node.attributes[name] = ir.AttrTensor(name, _converted(tensor))
        elif name in TYPE_ATTRIBUTES and attribute.value in types:
            node.attributes[name] = ir.AttrInt64(name, int(FLOAT32))


def _converted(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """The tensor in float32, converted whenever it is read: a large model is never in memory."""

    def read() -> ir.TensorProtocol:
        with np.errstate(over="ignore"):  # a double may be too large: inf, as onnxruntime casts it
            return ir.tensor(np.asarray(tensor.numpy()).astype(np.float32), name=tensor.name)

    shape = ir.Shape(tensor.shape.numpy())
    return ir.LazyTensor(read, dtype=FLOAT32, shape=shape, name=tensor.name)


def _cast_input(main: ir.Graph, value: ir.Value, dtype: ir.DataType) -> None:
    """Edit in place: nodes read the input in float32; an output that it is itself stays."""
    value.type = ir.TensorType(dtype)
    if not value.uses():
        return
    node = _cast(value, FLOAT32, f"{value.name}_float32")
    users = [use for use in value.uses() if use.node is not node]
    for use in users:
        use.node.replace_input_with(use.idx, node.outputs[0])
    main.insert_before(main[0], node)


def _cast_output(main: ir.Graph, value: ir.Value, dtype: ir.DataType) -> None:
    """Edit in place: the output is cast to its own type, behind all other nodes."""
    name, shape = value.name, value.shape
    value.name = f"{name}_float32"
    node = _cast(value, dtype, str(name))
    node.outputs[0].shape = shape
    for position, output in enumerate(main.outputs):
        if output is value:
            main.outputs[position] = node.outputs[0]
    main.append(node)


def _cast(value: ir.Value, dtype: ir.DataType, name: str) -> ir.Node:
    node = ir.Node("", "Cast", [value], [ir.AttrInt64("to", int(dtype))], name=f"quantmill_{name}")
    node.outputs[0].name = name
    node.outputs[0].type = ir.TensorType(dtype)
    node.outputs[0].shape = value.shape
    return node

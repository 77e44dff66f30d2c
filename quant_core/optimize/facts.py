"""What is known of a model's tensors without running it: shapes and types."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import onnx_ir as ir
from onnx_ir.passes import common as passes

from quant_core.model import graph
from quant_core.model.axes import Axes, distinct_axes
from quant_core.model.proto import cut_held_types, has_held_types

Sizes: TypeAlias = tuple[int | None, ...]  # one entry per axis, None where the size is open
Dims: TypeAlias = Axes  # the same; equal names stand for equal sizes


@dataclass(frozen=True, slots=True)
class Facts:
    """Shapes and types by tensor name.

    Shapes are inferred anew from those of the inputs: what a file claims of other tensors, outputs
    among them, is not believed.
    """

    known: dict[str, Dims]
    types: dict[str, ir.DataType]

    @classmethod
    def of(cls, model: ir.Model) -> Facts:
        """The facts of a normalized model, which is not changed."""
        copy = model.clone()
        if has_held_types(copy):
            cut_held_types(copy)
        for inside in graph.graphs_of(copy):
            for value in inside.inputs:
                if value.shape is not None:
                    value.shape = ir.Shape(distinct_axes([_dim(size) for size in value.shape]))
        for node in graph.nodes_of(copy):
            for output in node.outputs:
                output.shape = None
        passes.ShapeInferencePass(check_type=False, strict_mode=False)(copy)
        known, types = {}, {}
        for inside in graph.graphs_of(copy):
            values = [*inside.inputs, *(v for node in inside for v in node.outputs)]
            for value in values:
                if value.name and value.dtype is not None:
                    types[value.name] = value.dtype
                if value.name and value.shape is not None:
                    known[value.name] = tuple(_dim(n) for n in value.shape)
        return cls(known, types)

    def dims(self, value: ir.Value | None) -> Dims | None:
        """The sizes of a tensor and names of open ones, None where their number is unknown."""
        if value is None:
            return None
        if graph.is_constant(value):
            return graph.shape_of(value)
        return self.known.get(str(value.name))

    def shape(self, value: ir.Value | None) -> Sizes | None:
        """The sizes of a tensor, None where their number is unknown."""
        dims = self.dims(value)
        return None if dims is None else tuple(n if isinstance(n, int) else None for n in dims)

    def rank(self, value: ir.Value | None) -> int | None:
        """The number of axes, None where it is unknown."""
        shape = self.shape(value)
        return None if shape is None else len(shape)

    def size(self, value: ir.Value | None, axis: int) -> int | None:
        """The size along an axis, None where it is open or unknown."""
        shape = self.shape(value)
        if shape is None or not -len(shape) <= axis < len(shape):
            return None
        return shape[axis]

    def holds_float32(self, value: ir.Value) -> bool:
        """Whether the tensor is known to hold float32."""
        return self.types.get(str(value.name)) == ir.DataType.FLOAT


def _dim(n: object) -> int | str | None:
    name = getattr(n, "value", None)
    if isinstance(n, int):
        return n
    return name if isinstance(name, str) else None

"""What is known of a model's tensors without running it: their shapes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import onnx_ir as ir
from onnx_ir.passes import common as passes

from quant_core.model import graph

Sizes: TypeAlias = tuple[int | None, ...]  # one entry per axis, None where the size is open


@dataclass(frozen=True, slots=True)
class Facts:
    """Shapes by tensor name, inferred anew: what a file claims of inner tensors is not believed."""

    shapes: dict[str, Sizes]

    @classmethod
    def of(cls, model: ir.Model) -> Facts:
        """The facts of a normalized model, which is not changed."""
        copy = model.clone()
        for inside in graph.graphs_of(copy):
            for node in inside:
                for output in node.outputs:
                    if not output.is_graph_output():
                        output.shape = None
        passes.ShapeInferencePass(check_type=False, strict_mode=False)(copy)
        shapes = {}
        for inside in graph.graphs_of(copy):
            values = [*inside.inputs, *(v for node in inside for v in node.outputs)]
            for value in values:
                if value.name and value.shape is not None:
                    shapes[value.name] = tuple(_size(n) for n in value.shape)
        return cls(shapes)

    def shape(self, value: ir.Value | None) -> Sizes | None:
        """The sizes of a tensor, None where not even their number is known."""
        if value is None:
            return None
        if graph.is_constant(value):
            return graph.shape_of(value)
        return self.shapes.get(str(value.name))

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


def _size(n: object) -> int | None:
    return n if isinstance(n, int) else None

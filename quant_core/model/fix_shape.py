"""Open sizes of a model's inputs, fixed by whoever knows what it will be fed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import onnx_ir as ir

from quant_core.errors import RequestError, nearest_hint

Shape: TypeAlias = tuple[int | str | None, ...]  # a size, a name of an open one, or None


def fixed_shapes(inputs: Mapping[str, Shape], sizes: Mapping[str, int]) -> dict[str, Shape]:
    """The shapes of a model's inputs, by name, with these sizes fixed.

    sizes  name of an open size, or INPUT:AXIS -> size. Axes count from 0; a name stands for one
           size wherever it occurs

    Raises: RequestError for a name that the model does not have, and for an axis of another size.
    """
    shapes = dict(inputs)
    for key, size in sizes.items():
        named = _named(key, shapes)
        if isinstance(named, str):
            shapes = {name: _replaced(shape, named, size) for name, shape in shapes.items()}
            continue
        name, axis = named
        found = shapes[name][axis]
        if isinstance(found, int) and found != size:
            hint = f"The model takes {_described(inputs)}"
            raise RequestError(f"is {size}, but the model fixes it to {found}", _where(key), hint)
        shapes[name] = (*shapes[name][:axis], size, *shapes[name][axis + 1 :])
    return shapes


def fix_shapes(graph: ir.Graph, sizes: Mapping[str, int]) -> None:
    """Edit in place: the inputs of the main graph have these sizes, and so have its outputs where
    they have open sizes of the same names.

    Raises: as `fixed_shapes`.
    """
    if not sizes:
        return
    inputs = {str(v.name): _shape(v) for v in graph.inputs if v.shape is not None}
    fixed = fixed_shapes(inputs, sizes)
    names = {
        old: new
        for name, shape in inputs.items()
        for old, new in zip(shape, fixed[name], strict=True)
        if isinstance(old, str) and isinstance(new, int)
    }
    for value in graph.inputs:
        if value.name in fixed:
            value.shape = ir.Shape(fixed[value.name])
    for value in graph.outputs:
        if value.shape is not None:
            sized = [names.get(n, n) if isinstance(n, str) else n for n in _shape(value)]
            value.shape = ir.Shape(sized)


def state_known_sizes(graph: ir.Graph, known: Mapping[str, ir.Shape | None]) -> None:
    """Edit in place: open sizes of the outputs become those that inference found.

    known  output -> its inferred shape
    """
    for value in graph.outputs:
        found = known.get(str(value.name))
        if found is None or (value.shape is not None and len(value.shape) != len(found)):
            continue
        stated = found if value.shape is None else value.shape
        pairs = zip(stated, found, strict=True)
        value.shape = ir.Shape([new if isinstance(new, int) else old for old, new in pairs])


def _named(key: str, shapes: Mapping[str, Shape]) -> str | tuple[str, int]:
    """The name of an open size, or input and axis, that a key stands for."""
    names = {n for shape in shapes.values() for n in shape if isinstance(n, str)}
    if key in names:
        return key
    name, _, axis = key.rpartition(":")
    if name in shapes and axis.isdecimal() and int(axis) < len(shapes[name]):
        found = shapes[name][int(axis)]
        return found if isinstance(found, str) else (name, int(axis))
    places = [f"{name}:{i}" for name, shape in shapes.items() for i in range(len(shape))]
    near = nearest_hint(key, [*sorted(names), *places])
    hint = f"{near} The model takes {_described(shapes)}".lstrip()
    raise RequestError("is no open size of the model", _where(key), hint)


def _replaced(shape: Shape, name: str, size: int) -> Shape:
    return tuple(size if n == name else n for n in shape)


def _shape(value: ir.Value) -> Shape:
    assert value.shape is not None
    return tuple(map(_size, value.shape))


def _size(size: int | ir.SymbolicDim) -> int | str | None:
    """The size; its name if it is open; None without one, as where a file says 0 or less."""
    if isinstance(size, int):
        return size if size > 0 else None
    return size.value or None


def _described(shapes: Mapping[str, Shape]) -> str:
    return ", ".join(
        f"{name}[{', '.join('?' if n is None else str(n) for n in shape)}]"
        for name, shape in shapes.items()
    )


def _where(key: str) -> str:
    return f"fix_shape.{key}"

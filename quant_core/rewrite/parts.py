"""A constant that is a part of another, or of its transpose, is cut out of that at loading.

A model may multiply by a weight and by a concatenation that holds it: three projections as one
product, one of which is read alone too. Both are constants, as only constants compute in integers.
The file holds those of the whole, and nodes that cut the part out of it:

    int8 of the whole -> [Transpose] -> Slice -> int8 of the part
    int4 of the whole -> Cast -> [Transpose] -> Slice -> what a Cast of the part gives

onnxruntime folds these before it chooses kernels, so that what runs is the same. It folds nothing
behind a DequantizeLinear: hence the integers are cut, and not the numbers that they stand for.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quant_core.model import graph
from quant_core.rewrite.writer import Cursor, Writer

LEAST_BYTES = 1024  # of a part that is worth the nodes that cut it out
HALF_BYTES = frozenset({ir.DataType.INT4, ir.DataType.UINT4})  # which Slice does not take
STORED = frozenset({ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.FLOAT16}) | HALF_BYTES
SIGNATURE_BYTES = 8  # of a row, which tell most rows apart


@dataclass(frozen=True, slots=True)
class Part:
    """Where a constant is in a larger one: its rows along `axis` are rows of that along
    `axis_of_whole`, from `start`.
    """

    whole: ir.Value
    axis: int
    axis_of_whole: int
    start: int


def cut_parts(model: ir.Model, writer: Writer) -> None:
    """Edit in place: what is stored as a part of another constant is stored with that alone."""
    for inside in graph.graphs_of(model):
        for value, part in find_parts(filter(_is_stored, inside.initializers.values())).items():
            _cut(Cursor(writer, inside, inside[0]), value, part)
            del inside.initializers[str(value.name)]


def find_parts(constants: Iterable[ir.Value]) -> dict[ir.Value, Part]:
    """The large ones of these constants that are parts of others, which are parts of none."""
    found: dict[ir.Value, Part] = {}
    wholes: dict[tuple[object, ...], list[_Rows]] = {}
    for value in sorted(constants, key=lambda v: prod(graph.shape_of(v)), reverse=True):
        array = graph.array(value)
        if array.nbytes < LEAST_BYTES or array.ndim < 2:
            continue
        axes = (0, 1) if array.ndim == 2 else (0,)  # of a matrix also those of its transpose
        along = [_Rows.of(value, array, axis) for axis in axes]
        tried = (rows.found_in(whole) for rows in along for whole in wholes.get(rows.kind, ()))
        part = next(filter(None, tried), None)
        if part is not None:
            found[value] = part
            continue
        for rows in along:
            wholes.setdefault(rows.kind, []).append(rows)
    return found


@dataclass(frozen=True, slots=True, eq=False)
class _Rows:
    """The rows of a constant along an axis, (n, ...), and some bytes of each."""

    value: ir.Value
    axis: int
    rows: NDArray[Any]
    signatures: NDArray[np.uint64]

    @classmethod
    def of(cls, value: ir.Value, array: NDArray[Any], axis: int) -> _Rows:
        rows = np.moveaxis(array, axis, 0)
        columns = np.linspace(0, rows[0].size - 1, SIGNATURE_BYTES // rows.itemsize).astype(int)
        at: tuple[Any, ...] = (slice(None), *np.unravel_index(columns, rows.shape[1:]))
        some = rows[at]
        return cls(value, axis, rows, np.ascontiguousarray(some).view(np.uint64)[:, 0])

    @property
    def kind(self) -> tuple[object, ...]:
        """A key that is equal for constants that can be rows of one another."""
        return self.value.dtype, *self.rows.shape[1:]

    def found_in(self, whole: _Rows) -> Part | None:
        """Where the whole has all these rows in their order."""
        size = len(self.rows)
        at = np.flatnonzero(whole.signatures[: len(whole.rows) - size + 1] == self.signatures[0])
        for start in map(int, at):
            rows = slice(start, start + size)
            is_alike = np.array_equal(whole.signatures[rows], self.signatures)
            if is_alike and np.array_equal(whole.rows[rows], self.rows):
                return Part(whole.value, self.axis, whole.axis, start)
        return None


def _is_stored(value: ir.Value) -> bool:
    """Whether it is a constant of a stored type, and read as a Slice can give it."""
    if not graph.is_constant(value) or value.is_graph_output() or value.dtype not in STORED:
        return False
    are_casts = all(node.op_type == "Cast" for node in graph.consumers(value))
    return are_casts or value.dtype not in HALF_BYTES


def _cut(write: Cursor, value: ir.Value, part: Part) -> None:
    """Edit in place: what reads the constant reads what is cut out of the whole."""
    if value.dtype not in HALF_BYTES:
        value.replace_all_uses_with(_cut_out(write, value, part, part.whole))
        return
    for cast in graph.consumers(value):
        wide = write.node(
            "Cast", [part.whole], f"{value.name}_wide", to=cast.attributes["to"].value
        )
        cast.outputs[0].replace_all_uses_with(_cut_out(write, value, part, wide))
        graph.home(cast).remove(cast, safe=True)


def _cut_out(write: Cursor, value: ir.Value, part: Part, whole: ir.Value) -> ir.Value:
    """The part of the whole, which may have been cast."""
    size, size_of_whole = graph.shape_of(value)[part.axis], graph.shape_of(part.whole)
    if part.axis != part.axis_of_whole:
        whole = write.node("Transpose", [whole], f"{value.name}_turned", perm=(1, 0))
    if size == size_of_whole[part.axis_of_whole]:
        return whole
    bounds = (part.start, part.start + size, part.axis)
    inputs = [write.constant(f"{value.name}_at", np.array([n], np.int64)) for n in bounds]
    return write.node("Slice", [whole, *inputs], f"{value.name}_part")

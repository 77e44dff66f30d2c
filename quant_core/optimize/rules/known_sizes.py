"""Sizes and decisions that are computed at every run, although the graph fixes them."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quant_core.model import graph
from quant_core.model.unused import unread_branches
from quant_core.optimize.applied import Applied
from quant_core.optimize.edit import bypass, constant, remove
from quant_core.optimize.facts import Facts

MOST = 256  # entries of a tensor of sizes, positions or decisions
LARGEST = 1 << 31  # of computed entries, none of which then overflows
INTEGERS = {ir.DataType.INT64: np.int64, ir.DataType.INT32: np.int32, ir.DataType.BOOL: np.bool_}

Entries: TypeAlias = NDArray[np.object_]  # whole numbers, None where one is not known
Rule: TypeAlias = Callable[[ir.Node, list[Entries]], Entries | None]


def known_sizes(model: ir.Model, facts: Facts) -> list[Applied]:
    """Arithmetic with sizes becomes constants, and an If whose condition that decides, its branch.

        x(1, n, 8) -> Shape -> Gather(2) -> Mul(4) -> y    =>   y = 32
        If(Equal(Gather(Shape(x), 0), 1)) { a } { b }      =>   a

    1. Entries of small whole tensors are followed one by one: of a shape, some may be known and
       others not. Names of open sizes are not believed.
    2. A tensor whose entries are all known is a constant. It has at most 256 entries.
    3. The nodes and constants of the branch that is taken stand in place of the If.
    4. Whole numbers times zero are zero, as exporters write to keep an input that nothing needs.
    5. What a Cast to float makes of such a tensor is a constant too, and followed no further.
    """
    whole = _constants(model, facts)
    changed = []
    for value, numbers in whole.items():
        maker = value.producer()
        if maker is None or value.is_graph_output():
            continue
        results = [reader.outputs[0] for reader in graph.consumers(value)]
        if any(v not in whole or v.is_graph_output() for v in results):  # else nobody reads it
            value.replace_all_uses_with(constant(graph.home(maker), str(value.name), numbers))
            changed.append(str(maker.name))
    for inside in list(graph.graphs_of(model)):
        branches = [node for node in inside if node.op_type == "If" and not node.domain]
        changed += [str(node.name) for node in branches if _take_branch(node)]
    return [Applied("known_sizes", name, ()) for name in changed]


def _constants(model: ir.Model, facts: Facts) -> dict[ir.Value, NDArray[Any]]:
    """The tensors that are constants, as every entry is known (1. 2. 5.)."""
    known: dict[ir.Value, Entries] = {}
    for node in graph.nodes_of(model):
        entries = _entries_of(node, known, facts)
        if entries is not None and entries.size <= MOST:
            known[node.outputs[0]] = entries
    found: dict[ir.Value, NDArray[Any]] = {}
    for value, entries in known.items():
        numbers = _array(entries, value, facts)
        if numbers is not None:
            found[value] = numbers
            casts = filter(_casts_to_float, graph.consumers(value))
            found |= {node.outputs[0]: numbers.astype(np.float32) for node in casts}
    return found


def _array(entries: Entries, value: ir.Value, facts: Facts) -> NDArray[Any] | None:
    """The value as a constant, None if an entry or the type is not known."""
    dtype = facts.types.get(str(value.name))
    if dtype not in INTEGERS or any(n is None for n in entries.flat):
        return None
    return entries.astype(INTEGERS[dtype])


def _casts_to_float(node: ir.Node) -> bool:
    return node.op_type == "Cast" and graph.attribute(node, "to", 0) == ir.DataType.FLOAT


def _take_branch(node: ir.Node) -> bool:
    """Edit in place: the branch that a constant condition takes stands where the If stood (3.).

    Returns whether it does.
    """
    condition = graph.constant(node.inputs[0])
    if condition is None or condition.size != 1:
        return False
    inside = graph.home(node)
    name = "then_branch" if condition.reshape(()) else "else_branch"
    branch = node.attributes[name].as_graph()
    results = list(branch.outputs)
    is_read_twice = len({*results}) < len(results)
    for old, new in zip(node.outputs, results, strict=True):
        if old.is_graph_output() and (is_read_twice or new.producer() not in list(branch)):
            return False  # each output of a graph needs a node of that graph
    branch.outputs.clear()
    for value in list(branch.initializers.values()):
        del branch.initializers[str(value.name)]
        inside.register_initializer(value)
    for moved in list(branch):
        branch.remove(moved)
        inside.insert_before(node, moved)
    for old, new in zip(node.outputs, results, strict=True):
        bypass(old, new)
    unread_branches(node)
    remove([node])
    return True


def _entries_of(node: ir.Node, known: dict[ir.Value, Entries], facts: Facts) -> Entries | None:
    """The entries of the node's first output, None if none is known (1.)."""
    if node.domain or node.op_type not in RULES:
        return None
    if node.op_type in ("Shape", "Size"):
        dims = facts.shape(node.inputs[0])
        if dims is None or graph.value(node.inputs[0]).is_graph_output():
            return None
        return RULES[node.op_type](node, [_entries(dims)])
    operands = [_operand(value, known, facts) for value in node.inputs if value is not None]
    whole = [operand for operand in operands if operand is not None]
    if len(whole) != len(operands):
        return None
    try:
        return RULES[node.op_type](node, whole)
    except (IndexError, ValueError):
        return None  # a branch that is never taken may ask for an axis that there is not


def _operand(value: ir.Value, known: dict[ir.Value, Entries], facts: Facts) -> Entries | None:
    """The entries of an input: of a constant, all; of another tensor of known size, maybe none."""
    if value in known:
        return known[value]
    if not graph.is_constant(value):
        sizes = [-1 if n is None else n for n in facts.shape(value) or ()]
        is_whole = facts.types.get(str(value.name)) in INTEGERS
        is_known = facts.shape(value) is not None and -1 not in sizes and prod(sizes) <= MOST
        return np.full(sizes, None, object) if is_whole and is_known else None
    tensor = value.const_value
    if tensor is None or tensor.dtype not in INTEGERS or prod(graph.shape_of(value)) > MOST:
        return None
    return graph.array(value).astype(object)


def _entries(sizes: Any) -> Entries:
    found = np.empty(len(sizes), object)
    found[:] = [n if n is None else int(n) for n in sizes]
    return found


def _whole(entries: Entries) -> list[int] | None:
    """All entries in a row, None if one is not known."""
    flat = list(entries.flat)
    return None if None in flat else [int(n) for n in flat]


def _shape(node: ir.Node, operands: list[Entries]) -> Entries:
    end = graph.attribute(node, "end", None)
    return operands[0][graph.attribute(node, "start", 0) : end]


def _size(node: ir.Node, operands: list[Entries]) -> Entries | None:
    return _product(operands[0])


def _gather(node: ir.Node, operands: list[Entries]) -> Entries | None:
    indices = operands[1]
    if _whole(indices) is None:
        return None
    return np.asarray(
        np.take(operands[0], indices.astype(int), graph.attribute(node, "axis", 0)), object
    )


def _slice(node: ir.Node, operands: list[Entries]) -> Entries | None:
    data, *rest = operands
    starts, ends, *others = [_whole(n) for n in rest]
    axes = others[0] if others else list(range(len(starts or ())))
    steps = others[1] if len(others) > 1 else [1] * len(starts or ())
    if starts is None or ends is None or axes is None or steps is None:
        return None
    cut = [slice(None)] * data.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if step < 0:
            return None
        cut[axis] = slice(start, end, step)
    return data[tuple(cut)]


def _concat(node: ir.Node, operands: list[Entries]) -> Entries:
    return np.concatenate(operands, graph.attribute(node, "axis", 0))


def _reshape(node: ir.Node, operands: list[Entries]) -> Entries | None:
    target = _whole(operands[1])
    if target is None or 0 in target:
        return None
    return operands[0].reshape(target)


def _unsqueeze(node: ir.Node, operands: list[Entries]) -> Entries | None:
    axes = _whole(operands[1])
    return None if axes is None else np.expand_dims(operands[0], tuple(axes))


def _squeeze(node: ir.Node, operands: list[Entries]) -> Entries | None:
    axes = _whole(operands[1]) if len(operands) > 1 else None
    return np.asarray(np.squeeze(operands[0], None if axes is None else tuple(axes)), object)


def _cast(node: ir.Node, operands: list[Entries]) -> Entries | None:
    to = INTEGERS.get(ir.DataType(graph.attribute(node, "to", 0)))
    if to is None:
        return None
    convert = bool if to is np.bool_ else int
    return _each(lambda n: int(convert(n)), operands)


def _range(node: ir.Node, operands: list[Entries]) -> Entries | None:
    limits = [_whole(n) for n in operands]
    if any(n is None for n in limits):
        return None
    start, end, step = (n[0] for n in limits if n is not None)
    found = range(start, end, step) if step else range(0)
    return _entries(found) if len(found) <= MOST else None


def _where(node: ir.Node, operands: list[Entries]) -> Entries | None:
    condition, *choices = np.broadcast_arrays(*operands)
    picked = [None if c is None else a if c else b for c, a, b in zip(
        condition.flat, *(n.flat for n in choices), strict=True
    )]  # fmt: skip
    return _entries(picked).reshape(condition.shape)


def _reduced(node: ir.Node, operands: list[Entries]) -> Entries | None:
    if operands[0].ndim != 1 or graph.attribute(node, "noop_with_empty_axes", 0):
        return None
    found = _product(operands[0])
    return found.reshape(1) if found is not None and graph.attribute(node, "keepdims", 1) else found


def _product(entries: Entries) -> Entries | None:
    numbers = _whole(entries)
    return None if numbers is None else np.array(prod(numbers), object)


def _elementwise(compute: Callable[..., Any]) -> Rule:
    def rule(node: ir.Node, operands: list[Entries]) -> Entries | None:
        return _each(compute, operands)

    return rule


def _each(compute: Callable[..., Any], operands: list[Entries]) -> Entries:
    """The function of each entry and those that meet it; not known where one of them is not."""
    arrays = np.broadcast_arrays(*operands)
    rows = zip(*(array.flat for array in arrays), strict=True)
    found = [None if None in row else compute(*row) for row in rows]
    fitting = [n if n is None or abs(n) < LARGEST else None for n in found]
    return _entries(fitting).reshape(arrays[0].shape)


def _products(node: ir.Node, operands: list[Entries]) -> Entries:
    """Zero times an entry that is not known is zero (4.)."""
    arrays = np.broadcast_arrays(*operands)
    zero = np.zeros(arrays[0].shape, bool)
    for array in arrays:
        zero |= np.equal(array, 0).astype(bool)
    found = _each(lambda a, b: a * b, operands)
    found[zero] = 0
    return found


def _quotient(a: int, b: int) -> int | None:
    """As ONNX divides whole numbers: towards zero."""
    return None if b == 0 else abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


RULES: dict[str, Rule] = {
    "Shape": _shape, "Size": _size,
    "Gather": _gather, "Slice": _slice, "Concat": _concat, "Reshape": _reshape,
    "Unsqueeze": _unsqueeze, "Squeeze": _squeeze, "Range": _range, "Where": _where,
    "ReduceProd": _reduced, "Cast": _cast,
    "Identity": _elementwise(lambda a: a), "Neg": _elementwise(lambda a: -a),
    "Add": _elementwise(lambda a, b: a + b), "Sub": _elementwise(lambda a, b: a - b),
    "Mul": _products, "Div": _elementwise(_quotient),
    "Min": _elementwise(lambda *n: min(n)), "Max": _elementwise(lambda *n: max(n)),
    "Equal": _elementwise(lambda a, b: a == b), "Less": _elementwise(lambda a, b: a < b),
    "Greater": _elementwise(lambda a, b: a > b), "Not": _elementwise(lambda a: not a),
    "LessOrEqual": _elementwise(lambda a, b: a <= b),
    "GreaterOrEqual": _elementwise(lambda a, b: a >= b),
    "And": _elementwise(lambda a, b: a and b), "Or": _elementwise(lambda a, b: a or b),
}  # fmt: skip

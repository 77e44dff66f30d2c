"""Sizes for the open axes of a model's inputs, so that the inputs fit together."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from quant_core.data.input_hints import MASK, named_hint
from quant_core.data.input_spec import InputSpec
from quant_core.data.strategies import LENGTH, SIDE, Strategy

FEATURE_SIDE = 64  # of a latent image: 512 pixels behind three halvings
SAMPLE_RATE = 16000  # of audio, of which one second is drawn
BATCH = "batch"  # in the names of open axes
# Open axes named so are no batch, though they may come first.
STEPS = re.compile(r"seq|len|time|frame|token|atom|node|edge|point|step|past|width|height|sample")
# Inputs named so say how much noise an image has: one number for all, or one for each.
TIMESTEP = re.compile(r"(^|_)time_?steps?$")
# Inputs named so carry a state from one run to the next: their open axes are the batch.
STATE = re.compile(r"state|hidden|cell|(^|_)[hc]\d*($|_)")
# Inputs named so are the keys and values of the steps before: their open axes are no sides.
PAST = re.compile(r"past|cache")
# Open axes named so are no sides, though their input has rank 4.
NO_SIDE = re.compile(r"seq|len|past|point|token|box|quer")
# Open axes written so are computed from others. Any other text is a name: `DynamicDimension.1`.
COMPUTED = re.compile(r"[-+*/%()]")
OPERATIONS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}


def sizes_of_symbols(inputs: Sequence[InputSpec], strategy: Strategy) -> dict[str, int]:
    """Symbol -> size. One symbol has one size, wherever it stands; sums of symbols add up.

    1. A symbol that is called a batch is one, and so is that of a first axis, unless its
       name says that it counts steps, or another axis of the input has it too. That of the
       timestep of a diffusion model is a batch, whatever its name.
    2. An open axis of an image (rank 4) is a side, of a state 1, any other a length. Latents and
       features of an encoder have more channels than an image, and shorter sides, and so has what
       shares their axes.
    3. `a + b` has the sum of both sizes. `total...`, and the axis that only a mask has, have that
       of the past and of what is new.
    """
    named = [(spec, size) for spec in inputs for size in spec.shape if isinstance(size, str)]
    symbols: dict[str, int] = {}
    for spec, size in named:  # 1
        name = size.lower()
        is_first = size == spec.shape[0] and size not in spec.shape[1:]
        counts_steps = STEPS.search(name) and not TIMESTEP.search(spec.name.lower())
        if BATCH in name or (is_first and not counts_steps):
            symbols[size] = strategy.batch
    for spec, size in sorted(named, key=lambda pair: not _has_features(pair[0])):  # 2
        if not COMPUTED.search(size):
            symbols.setdefault(size, _open_size(spec, size, strategy, inputs))
    symbols |= _totals(named, symbols)  # 3
    for _, size in named:
        if size not in symbols:
            computed = _computed(size, symbols, strategy)
            symbols[size] = strategy.length if computed is None else computed
    return symbols


def _totals(named: Sequence[tuple[InputSpec, str]], symbols: Mapping[str, int]) -> dict[str, int]:
    """The sizes of symbols that cover both the past and what is new; none without a past.

    Such a symbol is called `total...`, or only masks have it. What is new is as long as the first
    axis that is called a sequence, or that whole numbers have; else it is one step.
    """
    inner = [(spec, size) for spec, size in named if size in symbols and size != spec.shape[0]]
    others = {size for spec, size in inner if not _is_mask_of_all(spec)}
    totals = {size for _, size in inner if "total" in size.lower() or size not in others}
    past = {s for spec, s in inner if "past" in s.lower() or PAST.search(spec.name.lower())}
    past_length = max((symbols[s] for s in past - totals), default=0)
    if not past_length:
        return {}
    new = [(spec, s) for spec, s in inner if s not in past | totals]
    steps = [symbols[s] for spec, s in new if "seq" in s.lower() or spec.dtype.kind == "i"]
    return dict.fromkeys(totals, past_length + (steps[0] if steps else 1))


def _is_mask_of_all(spec: InputSpec) -> bool:
    name = spec.name.lower()
    return bool(MASK.search(name)) and "encoder" not in name


def _open_size(
    spec: InputSpec, symbol: str | None, strategy: Strategy, inputs: Sequence[InputSpec]
) -> int:
    is_square = symbol is not None and spec.shape.count(symbol) > 1
    is_sound = named_hint(spec).is_audio and len(spec.shape) <= 2 and not is_square
    if is_sound and strategy.length == LENGTH:
        return SAMPLE_RATE
    name = "" if symbol is None else symbol.lower()
    is_state = STATE.search(spec.name.lower()) and not STEPS.search(name)
    if is_state or (strategy.is_alone and spec is not inputs[0]):
        return 1
    is_past = PAST.search(spec.name.lower()) or NO_SIDE.search(name)
    is_side = len(spec.shape) == 4 and not is_past
    if not is_side:
        return strategy.length
    return FEATURE_SIDE if strategy.side == SIDE and _has_features(spec) else strategy.side


def _has_features(spec: InputSpec) -> bool:
    """Whether an input of rank 4 has more channels than an image, first or last."""
    ends = spec.shape[1::2] if len(spec.shape) == 4 else ()
    known = [size for size in ends if isinstance(size, int)]
    return bool(known) and min(known) > 3


def _computed(text: str, symbols: Mapping[str, int], strategy: Strategy) -> int | None:
    """The value of an expression of symbols, such as `past_length + 1`; None for other texts."""

    def value(node: ast.expr) -> int:
        match node:
            case ast.Constant(int(number)):
                return number
            case ast.Name(name):
                return symbols.get(name, strategy.length)
            case ast.BinOp(left, operation, right) if type(operation) in OPERATIONS:
                return OPERATIONS[type(operation)](value(left), value(right))
        raise ValueError(text)

    try:
        size = value(ast.parse(text, mode="eval").body)
    except (ArithmeticError, RecursionError, SyntaxError, ValueError):
        return None
    return size if 0 < size <= 1 << 20 else None


def closed_shape(
    spec: InputSpec,
    sizes: Mapping[str, int],
    strategy: Strategy,
    inputs: Sequence[InputSpec],
) -> tuple[int, ...]:
    """The input's shape with a size for every open axis; that of a batch for a first one without
    a symbol.
    """

    def size_of(axis: int, size: int | str | None) -> int:
        if isinstance(size, int):
            return size
        if size is not None:
            return sizes[size]
        return strategy.batch if axis == 0 else _open_size(spec, None, strategy, inputs)

    return tuple(size_of(axis, size) for axis, size in enumerate(spec.shape))


def count_steps(inputs: Sequence[InputSpec], shapes: Mapping[str, tuple[int, ...]]) -> int:
    """How many steps the inputs have: their largest open axis, else the second of any input."""
    open_sizes: list[int] = []
    second: list[int] = []
    for spec in inputs:
        shape = shapes[spec.name]
        open_sizes += _open_steps(spec, shape)
        second += shape[1:2]
    return max(open_sizes or second, default=1)


def image_side(shapes: Iterable[tuple[int, ...]]) -> int:
    """The shorter side of the largest image among inputs of these shapes, channels first or last;
    SIDE without one.
    """
    return max((sorted(shape[1:])[1] for shape in shapes if len(shape) == 4), default=SIDE)


def _open_steps(spec: InputSpec, shape: tuple[int, ...]) -> Iterator[int]:
    for axis, size in enumerate(spec.shape):
        counts_steps = axis > 0 or (isinstance(size, str) and STEPS.search(size.lower()))
        if not isinstance(size, int) and counts_steps:
            yield shape[axis]

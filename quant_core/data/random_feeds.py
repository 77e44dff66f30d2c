"""Random samples that a model can take: they fit together, index within tables, and run."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from quant_core.data.containers import DTYPES, boxed, element_type
from quant_core.data.input_hints import Hint, fixed_sizes, input_hints, named_hint
from quant_core.data.sources import Feed, InputSpec
from quant_core.errors import DataError, ModelError
from quant_core.model import files
from quant_core.model.session import open_session, run

COUNT = 16  # feeds, if nobody says how many
ITEMS = 3  # of a sequence
PROBED = 8  # feeds that the model is run on before they are used
SIDE = 224  # of an open spatial axis of an image (rank 4)
SAMPLE_RATE = 16000  # of audio, of which one second is drawn
LENGTH = 32  # of any other open axis that is not the batch
COARSE = 8  # patches along each side of a random image
# Open axes named so are no batch, though they may come first.
STEPS = re.compile(r"seq|len|time|frame|token|atom|node|edge|point|step|past|width|height|sample")
# Inputs named so carry a state from one run to the next: their open axes are the batch.
STATE = re.compile(r"state|hidden|cell|(^|_)[hc]\d*($|_)")
# Open axes written so are computed from others. Any other text is a name: `DynamicDimension.1`.
COMPUTED = re.compile(r"[-+*/%()]")
OPERATIONS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}


@dataclass(frozen=True, slots=True)
class Strategy:
    """One way to draw.

    length    of open axes that are neither the batch nor a side of an image
    is_alone  whether only the first input has open axes of that length, and all others of 1
    side      of open sides of an image
    masks     the value of every mask: 1 where that keeps a position, 0 where that does
    least     of whole numbers that index a table: 0 is often the padding
    integers  the one value of all other whole numbers; None: what the hints allow
    """

    length: int = LENGTH
    side: int = SIDE
    masks: int = 1
    least: int = 0
    integers: int | None = None
    is_alone: bool = False


STRATEGIES = (
    Strategy(),
    Strategy(masks=0),
    Strategy(least=1),
    Strategy(integers=1),
    Strategy(integers=0),
    Strategy(length=128, side=256),
    Strategy(length=64, side=64),
    Strategy(length=512, side=640),
    Strategy(length=16, side=32),
    Strategy(length=1, side=128),
    Strategy(length=16000, side=320),
    Strategy(length=512, side=512, masks=0),
    Strategy(is_alone=True),
    Strategy(length=512, is_alone=True),
    Strategy(length=8, side=16, integers=0),
)


@dataclass(frozen=True, slots=True)
class Range:
    """How an input is drawn: from these texts, or from low to high. Without these, floats are
    normal.

    is_whole  values are whole numbers, both ends included, whatever their type
    """

    shape: tuple[int, ...]
    low: float | None = None
    high: float = 0.0
    is_whole: bool = False
    is_audio: bool = False
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class RandomSource:
    """Feeds drawn from (seed, position), so that they are the same in any shards.

    skipped  draws on which the model does not run, or is not finite, in ascending order
    """

    inputs: Sequence[InputSpec]
    ranges: Mapping[str, Range]
    seed: int
    length: int
    name: str = "random"
    skipped: tuple[int, ...] = ()

    def read(self, position: int) -> Feed:
        for skipped in self.skipped:
            position += skipped <= position
        rng = np.random.default_rng([self.seed, position])
        return {spec.name: _draw(spec, self.ranges[spec.name], rng) for spec in self.inputs}

    @property
    def is_varied(self) -> bool:
        """Whether whole numbers or texts differ from feed to feed."""
        drawn = self.ranges.values()
        return any(r.choices or (r.is_whole and r.low != r.high) for r in drawn)

    def where(self, position: int) -> str:
        return f"random sample {position}"

    def size(self, position: int) -> int:
        return max((spec.batch for spec in self.inputs), default=1)

    def hash_into(self, update: Callable[[bytes], None]) -> None:
        ranges = [(str(spec), self.ranges[spec.name]) for spec in self.inputs]
        update(repr(("random", self.seed, ranges, self.skipped)).encode())


def random_source(
    inputs: tuple[InputSpec, ...],
    count: int | None,
    seed: int,
    model: Path | None = None,
) -> RandomSource:
    """Random feeds for a model, by the first strategy with which its outputs are finite.

    If its outputs are finite with none, the first with which it runs. Without `model`, the first
    strategy, with the hints that names give.

    Raises: DataError if the model runs with none, or takes text that it does not name.
    """
    hints = {spec.name: named_hint(spec) for spec in inputs}
    has_open_axes = any(not isinstance(size, int) for spec in inputs for size in spec.shape)
    if model is not None:
        graph = files.load(model)
        inputs, hints = fixed_sizes(graph, inputs), input_hints(graph, inputs)
    for spec in inputs:
        if spec.dtype.kind == "U" and not hints[spec.name].choices:
            raise DataError(
                "takes text, for which there is no random", spec.name, "Give real samples"
            )
    feeds = (count or COUNT) // max((spec.batch for spec in inputs), default=1)
    sources = _distinct_sources(inputs, hints, seed, max(1, feeds))
    is_certain = len(sources) == 1 and not has_open_axes and not sources[0].is_varied
    if model is None or is_certain:
        return sources[0]
    return _first_that_runs(sources, model)


def first_strategy(
    inputs: tuple[InputSpec, ...], count: int, seed: int, model: Path
) -> RandomSource:
    """Random values of these inputs of a model, which has others too, so that none is tried."""
    graph = files.load(model)
    hints = input_hints(graph, inputs)
    return _distinct_sources(fixed_sizes(graph, inputs), hints, seed, count)[0]


def _distinct_sources(
    inputs: tuple[InputSpec, ...], hints: Mapping[str, Hint], seed: int, length: int
) -> list[RandomSource]:
    """A source for every strategy that differs from those before it."""
    found: list[RandomSource] = []
    for strategy in STRATEGIES:
        sizes = _sizes(inputs, strategy)
        shapes = {spec.name: _shape(spec, sizes, strategy, inputs) for spec in inputs}
        longest = _steps(inputs, shapes)
        ranges = {
            spec.name: _range(spec, shapes[spec.name], hints[spec.name], strategy, sizes, longest)
            for spec in inputs
        }
        if all(ranges != source.ranges for source in found):
            found.append(RandomSource(inputs, ranges, seed, length))
    return found


def _first_that_runs(sources: Sequence[RandomSource], model: Path) -> RandomSource:
    session = open_session(model, packed=False)
    runs: RandomSource | None = None
    failure: ModelError | None = None
    for source in sources:
        try:
            outputs = run(session, source.read(0), str(model))
        except ModelError as error:
            failure = failure or error
            continue
        if all(_is_finite(output) for output in outputs):
            return _without_failures(source, session)
        runs = runs or source
    if runs is None:
        assert failure is not None
        raise DataError(
            f"no random sample fits: {failure.problem}", str(model), "Give samples, or a `shape`"
        ) from failure
    return runs


def _without_failures(source: RandomSource, session: ort.InferenceSession) -> RandomSource:
    """The source without those of its first draws on which the model fails, or is not finite.

    Whole numbers and texts decide which way a model takes: without such inputs the first draw
    stands for all.
    """
    if not source.is_varied:
        return source
    wanted = min(source.length, PROBED)
    skipped: list[int] = []
    for draw in range(2 * wanted):
        if draw - len(skipped) == wanted:
            break
        try:
            outputs = run(session, source.read(draw))
        except ModelError:
            skipped.append(draw)
            continue
        if not all(_is_finite(output) for output in outputs):
            skipped.append(draw)
    return replace(source, skipped=tuple(skipped))


def _is_finite(output: np.ndarray) -> bool:
    return output.dtype.kind != "f" or bool(np.isfinite(output).all())


def _sizes(inputs: Sequence[InputSpec], strategy: Strategy) -> dict[str, int]:
    """Symbol -> size. One symbol has one size, wherever it stands; sums of symbols add up.

    1. A symbol of a first axis is the batch, 1, unless its name says that it counts steps.
    2. An open axis of an image (rank 4) is a side, of a state 1, any other a length.
    3. `a + b` has the sum of both sizes. `total...` has that of `past...` and of what is new.
    """
    symbols: dict[str, int] = {}
    for spec in inputs:
        if (
            spec.shape
            and isinstance(spec.shape[0], str)
            and not STEPS.search(spec.shape[0].lower())
        ):
            symbols[spec.shape[0]] = 1
    for spec in inputs:
        for size in spec.shape:
            if isinstance(size, str) and not COMPUTED.search(size):
                symbols.setdefault(size, _open_size(spec, size, strategy, inputs))
    past = next((n for s, n in symbols.items() if "past" in s.lower()), 0)
    new = [s for s in symbols if "seq" in s.lower() and not re.search("past|total", s.lower())]
    for symbol in symbols:
        if "total" in symbol.lower() and past:
            symbols[symbol] = past + (symbols[new[0]] if new else 1)
    for spec in inputs:
        for size in spec.shape:
            if isinstance(size, str) and size not in symbols:
                computed = _computed(size, symbols, strategy)
                symbols[size] = strategy.length if computed is None else computed
    return symbols


def _open_size(
    spec: InputSpec, symbol: str | None, strategy: Strategy, inputs: Sequence[InputSpec]
) -> int:
    if named_hint(spec).is_audio and len(spec.shape) <= 2 and strategy.length == LENGTH:
        return SAMPLE_RATE
    name = "" if symbol is None else symbol.lower()
    is_state = STATE.search(spec.name.lower()) and not STEPS.search(name)
    if is_state or (strategy.is_alone and spec is not inputs[0]):
        return 1
    is_side = len(spec.shape) == 4 and not re.search("seq|len|past", name)
    return strategy.side if is_side else strategy.length


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


def _shape(
    spec: InputSpec,
    sizes: Mapping[str, int],
    strategy: Strategy,
    inputs: Sequence[InputSpec],
) -> tuple[int, ...]:
    """The input's shape with a size for every open axis; 1 for a first axis without a symbol."""
    return tuple(
        size
        if isinstance(size, int)
        else sizes[size]
        if size is not None
        else 1
        if axis == 0
        else _open_size(spec, None, strategy, inputs)
        for axis, size in enumerate(spec.shape)
    )


def _steps(inputs: Sequence[InputSpec], shapes: Mapping[str, tuple[int, ...]]) -> int:
    """How many steps the inputs have: their largest open axis, else the second of any input."""
    open_sizes: list[int] = []
    second: list[int] = []
    for spec in inputs:
        shape = shapes[spec.name]
        open_sizes += _open_steps(spec, shape)
        second += shape[1:2]
    return max(open_sizes or second, default=1)


def _open_steps(spec: InputSpec, shape: tuple[int, ...]) -> Iterator[int]:
    for axis, size in enumerate(spec.shape):
        counts_steps = axis > 0 or (isinstance(size, str) and STEPS.search(size.lower()))
        if not isinstance(size, int) and counts_steps:
            yield shape[axis]


def _range(
    spec: InputSpec,
    shape: tuple[int, ...],
    hint: Hint,
    strategy: Strategy,
    sizes: Mapping[str, int],
    steps: int,
) -> Range:
    """How the input is drawn."""
    if spec.dtype.kind == "U":
        return Range(shape, choices=hint.choices)
    if spec.container:
        open_size = strategy.length if len(hint.item) < 4 else strategy.side
        item = tuple(size if isinstance(size, int) else open_size for size in hint.item)
        return Range(item, choices=hint.choices)
    if hint.value is not None:
        return Range(shape, hint.value, hint.value)
    if hint.is_mask:
        return Range(shape, strategy.masks, strategy.masks)
    if spec.dtype.kind == "f" and hint.below is None:
        if hint.top is not None:
            return Range(shape, hint.top / 2 if hint.top == 1 else 0.0, hint.top)
        return Range(shape, is_audio=hint.is_audio)
    if hint.is_length and strategy.integers is None:
        return Range(shape, steps, steps, is_whole=True)
    if strategy.integers is not None:
        return Range(shape, strategy.integers, strategy.integers, is_whole=True)
    below = sizes.get(hint.below) if isinstance(hint.below, str) else hint.below
    if below is None:
        below = 256 if spec.dtype == np.uint8 else 2
    high = max(0, below - 1)
    least = strategy.least if hint.below is not None else 0
    return Range(shape, min(least, high), high, is_whole=True)


def _draw(spec: InputSpec, drawn: Range, rng: np.random.Generator) -> np.ndarray:
    """Values of an input; those of an image are added to even patches, as real images have."""
    if spec.dtype.kind == "U":
        return rng.choice(np.array(drawn.choices), drawn.shape)
    if spec.container:
        return _draw_container(spec, drawn, rng)
    if drawn.low is not None:
        if not drawn.is_whole:
            return rng.uniform(drawn.low, drawn.high, drawn.shape).astype(spec.dtype)
        return rng.integers(int(drawn.low), int(drawn.high) + 1, drawn.shape).astype(spec.dtype)
    values = rng.standard_normal(drawn.shape)
    if drawn.is_audio:
        return _tones(values, rng).astype(spec.dtype)
    if _is_image(drawn.shape):
        values = (values + _patches(drawn.shape, rng)) / np.sqrt(2)
    return values.astype(spec.dtype)


def _draw_container(spec: InputSpec, drawn: Range, rng: np.random.Generator) -> np.ndarray:
    """A sequence of a few tensors, or a map with a number for each key that the model knows."""
    dtype = np.dtype(DTYPES[element_type(spec.container)])
    sizes = [() if "map(" in spec.container else drawn.shape] * (len(drawn.choices) or ITEMS)
    values = [rng.standard_normal(size).astype(dtype) for size in sizes]
    if "map(" not in spec.container:
        return boxed(values)
    keys: list[Any] = list(drawn.choices or range(len(values)))
    if "map(int64" in spec.container:
        keys = [int(key) for key in keys]
    return boxed(dict(zip(keys, (value.item() for value in values), strict=True)))


def _is_image(shape: tuple[int, ...]) -> bool:
    return len(shape) == 4 and shape[1] in (1, 3, 4) and min(shape[2:]) >= 2 * COARSE


def _tones(noise: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A few tones that come and go along the last axis, and little noise, within [-1, 1]."""
    time = np.arange(noise.shape[-1] if noise.ndim else 1) / SAMPLE_RATE
    sound = 0.01 * noise
    for frequency in rng.uniform(80, 3000, 4):
        loudness = 0.2 * np.sin(np.pi * rng.uniform(0.5, 4) * time) ** 2
        sound = sound + loudness * np.sin(2 * np.pi * frequency * time)
    return np.clip(sound, -1, 1).reshape(noise.shape)


def _patches(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Normal values that are even in each of COARSE by COARSE patches of the last two axes."""
    patches = rng.standard_normal((*shape[:-2], COARSE, COARSE))
    for axis in (-2, -1):
        size = -(-shape[axis] // COARSE)
        patches = np.repeat(patches, size, axis=axis).take(range(shape[axis]), axis=axis)
    return patches

"""Random samples that a model can take: they fit together, index within tables, and run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnxruntime as ort

from quant_core.data.fixed_sizes import baked_sizes, fixed_sizes
from quant_core.data.input_hints import Hint, input_hints, named_hint
from quant_core.data.input_spec import InputSpec
from quant_core.data.open_sizes import closed_shape, count_steps, image_side, sizes_of_symbols
from quant_core.data.random_values import Range, draw, find_range
from quant_core.data.strategies import strategies
from quant_core.errors import DataError, ModelError
from quant_core.model import files
from quant_core.model.axes import distinct_axes
from quant_core.model.session import Feed, open_session, run

COUNT = 16  # feeds, if nobody says how many
PROBED = 8  # feeds that the model is run on before they are used, at most


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
        return {spec.name: draw(spec, self.ranges[spec.name], rng) for spec in self.inputs}

    @property
    def is_varied(self) -> bool:
        """Whether whole numbers or texts differ from feed to feed."""
        drawn = self.ranges.values()
        return any(r.choices or (r.is_whole and r.low != r.high) for r in drawn)

    @property
    def probed(self) -> int:
        """How many feeds the model is run on before they are used."""
        return min(self.length, PROBED)

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
    session: ort.InferenceSession | None = None,
) -> RandomSource:
    """Random feeds for a model, by the first strategy with which most of its outputs are finite.

    If there is none, the first with which some are, or with which it runs. Without `model`, the
    first strategy, with the hints that names give.

    session  of the model, from callers that have one

    Raises: DataError if the model runs with none, or takes text that it does not name; ModelError
    if it does not load.
    """
    hints, sizes = {spec.name: named_hint(spec) for spec in inputs}, list[int]()
    if model is not None:
        graph = files.load(model)
        inputs, hints = fixed_sizes(graph, inputs), input_hints(graph, inputs)
        sizes = baked_sizes(graph)
    for spec in inputs:
        if spec.dtype.kind == "U" and not hints[spec.name].choices:
            raise DataError(
                "takes text, for which there is no random", spec.name, "Give real samples"
            )
    feeds = (count or COUNT) // max((spec.batch for spec in inputs), default=1)
    sources = _distinct_sources(inputs, hints, seed, max(1, feeds), sizes)
    if model is None:
        return next(sources)
    return _first_that_runs(sources, session or open_session(model, optimize=False), model)


def first_strategy(
    inputs: tuple[InputSpec, ...], count: int, seed: int, model: Path
) -> RandomSource:
    """Random values of some of a model's inputs, by the first strategy: the model is not run."""
    graph = files.load(model)
    hints = input_hints(graph, inputs)
    return next(_distinct_sources(fixed_sizes(graph, inputs), hints, seed, count))


def _distinct_sources(
    inputs: tuple[InputSpec, ...],
    hints: Mapping[str, Hint],
    seed: int,
    length: int,
    sizes: Sequence[int] = (),
) -> Iterator[RandomSource]:
    """A source for every strategy that differs from those before it.

    sizes  that open axes may have
    """
    inputs = tuple(replace(spec, shape=distinct_axes(spec.shape)) for spec in inputs)
    found: list[Mapping[str, Range]] = []
    for strategy in strategies(sizes):
        by_symbol = sizes_of_symbols(inputs, strategy)
        shapes = {spec.name: closed_shape(spec, by_symbol, strategy, inputs) for spec in inputs}
        steps, side = count_steps(inputs, shapes), image_side(shapes.values())
        ranges = {
            spec.name: find_range(
                spec, shapes[spec.name], hints[spec.name], strategy, by_symbol, steps, side
            )
            for spec in inputs
        }
        if ranges not in found:
            found.append(ranges)
            yield RandomSource(inputs, ranges, seed, length)


def _first_that_runs(
    sources: Iterable[RandomSource], session: ort.InferenceSession, model: Path
) -> RandomSource:
    runs: RandomSource | None = None
    failure: ModelError | None = None
    for source in sources:
        try:
            outputs = run(session, source.read(0), str(model))
        except ModelError as error:
            failure = failure or error
            continue
        if all(_is_finite(output) for output in outputs):
            source = _without_failures(source, session)
            if len(source.skipped) <= source.probed:
                return source
        runs = runs or source
    if runs is None:
        assert failure is not None
        raise DataError(
            f"no random sample fits: {failure.problem}",
            str(model),
            "Give samples (`data`), or sizes for its open axes (`shape`)",
        ) from failure
    return runs


def _without_failures(source: RandomSource, session: ort.InferenceSession) -> RandomSource:
    """The source without those of its first draws on which the model fails, or is not finite.

    Whole numbers and texts decide which way a model takes: without such inputs the first draw
    stands for all.
    """
    if not source.is_varied:
        return source
    skipped: list[int] = []
    for position in range(2 * source.probed):
        if position - len(skipped) == source.probed:
            break
        try:
            outputs = run(session, source.read(position))
        except ModelError:
            skipped.append(position)
            continue
        if not all(_is_finite(output) for output in outputs):
            skipped.append(position)
    return replace(source, skipped=tuple(skipped))


def _is_finite(output: np.ndarray) -> bool:
    return output.dtype.kind != "f" or bool(np.isfinite(output).all())

"""Sources of feeds: files, arrays and Python objects.

A source gives feeds by position; they are not yet checked against the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from quant_core.data.hashes import hash_array, hash_file, hash_value
from quant_core.data.input_spec import InputSpec, describe_inputs, did_you_mean
from quant_core.data.npz import Array, array_shapes, open_arrays, read_arrays
from quant_core.errors import DataError
from quant_core.model.containers import boxed
from quant_core.model.session import Feed

T = TypeVar("T")


class Source(Protocol):
    """Feeds by position, not yet checked against the model."""

    @property
    def name(self) -> str:
        """What errors call it."""
        ...

    @property
    def length(self) -> int:
        """How many feeds there are."""
        ...

    def read(self, position: int) -> Mapping[str, np.ndarray]:
        """Input -> array of the feed there. Raises: DataError if it cannot be read."""
        ...

    def where(self, position: int) -> str:
        """What errors call the feed there."""
        ...

    def size(self, position: int) -> int:
        """The samples in that feed, which is the number of its rows of labels."""
        ...

    def hash_into(self, update: Callable[[bytes], None]) -> None:
        """Hand all that makes these feeds what they are to a hash."""
        ...


def open_source(source: Any, inputs: tuple[InputSpec, ...]) -> Source:
    """The source that a SampleSpec names, if that is not random.

    Raises: DataError if the source is of no known kind, cannot be read, or does not have the
    inputs' names, ranks and numbers of samples.
    """
    if isinstance(source, (str, Path)):
        path = Path(source)
        if path.is_dir():
            return _folder(path, inputs)
        return _arrays(str(path), open_arrays(path), inputs, path)
    if hasattr(source, "__array__"):
        return _arrays("array", {"": np.asarray(source)}, inputs)
    if isinstance(source, Mapping):
        arrays = {str(name): np.asarray(array) for name, array in source.items()}
        return _arrays("arrays", arrays, inputs)
    if isinstance(source, Iterable):
        return _feeds(source, inputs)
    raise DataError(
        f"is {source!r}", "samples", "A path, an array, a mapping of arrays, feeds, or 'random'"
    )


def open_some(source: Any, inputs: Sequence[InputSpec]) -> Source:
    """The source that a SampleSpec names, with those of the inputs that it has arrays for.

    Its feeds may hold arrays of other names too. A single array is that of the first input.

    Raises: DataError if the source cannot be read, or has an array for none of the inputs.
    """
    if not isinstance(source, (str, Path)) or Path(source).is_dir():
        return open_source(source, tuple(inputs))
    arrays = open_arrays(Path(source))
    if list(arrays) == [""]:
        arrays = {inputs[0].name: arrays[""]}
    known = tuple(spec for spec in inputs if spec.name in arrays)
    if not known:
        problem = f"holds {', '.join(arrays)}, of which the model takes none"
        raise DataError(problem, str(source), f"The model takes {describe_inputs(inputs)}")
    some = {spec.name: arrays[spec.name] for spec in known}
    return _arrays(str(source), some, known, Path(source))


@dataclass(frozen=True, slots=True, eq=False)
class ArraySource:
    """Arrays of all samples.

    steps   input -> its rows that make a feed; 0: one row without its axis; None: the whole array
    length  the number of feeds
    """

    name: str
    arrays: Mapping[str, Array]
    steps: Mapping[str, int | None]
    length: int
    path: Path | None

    def read(self, position: int) -> Feed:
        return {name: self._part(name, array, position) for name, array in self.arrays.items()}

    def _part(self, name: str, array: Array, position: int) -> np.ndarray:
        step = self.steps[name]
        if step is None:
            return np.asarray(array)
        if step == 0:
            return array[position : position + 1].reshape(array.shape[1:])
        return array[position * step : (position + 1) * step]

    def where(self, position: int) -> str:
        return f"{self.name}, sample {position}"

    def size(self, position: int) -> int:
        return max((step for step in self.steps.values() if step), default=1)

    def hash_into(self, update: Callable[[bytes], None]) -> None:
        if self.path is not None:
            hash_file(self.path, update)
        else:
            for name, array in sorted(self.arrays.items()):
                hash_array(name, np.asarray(array), update)


@dataclass(frozen=True, slots=True, eq=False)
class FileSource:
    """A folder with a file for each feed."""

    name: str
    paths: Sequence[Path]
    inputs: Sequence[InputSpec]

    @property
    def length(self) -> int:
        return len(self.paths)

    def read(self, position: int) -> Feed:
        return read_arrays(self.paths[position])

    def where(self, position: int) -> str:
        return str(self.paths[position])

    def size(self, position: int) -> int:
        return _batch_size(array_shapes(self.paths[position]), self.inputs)

    def hash_into(self, update: Callable[[bytes], None]) -> None:
        for path in self.paths:
            hash_file(path, update)


@dataclass(frozen=True, slots=True, eq=False)
class FeedSource:
    """Feeds from Python."""

    name: str
    feeds: Sequence[Mapping[str, np.ndarray]]
    inputs: Sequence[InputSpec]

    @property
    def length(self) -> int:
        return len(self.feeds)

    def read(self, position: int) -> Mapping[str, np.ndarray]:
        return self.feeds[position]

    def where(self, position: int) -> str:
        return f"{self.name}, feed {position}"

    def size(self, position: int) -> int:
        containers = {spec.name for spec in self.inputs if spec.container}
        arrays = self.feeds[position].items()
        shapes = {name: () if name in containers else np.shape(array) for name, array in arrays}
        return _batch_size(shapes, self.inputs)

    def hash_into(self, update: Callable[[bytes], None]) -> None:
        containers = {spec.name for spec in self.inputs if spec.container}
        for feed in self.feeds:
            for name, value in sorted(feed.items()):
                array = boxed(value) if name in containers else np.asarray(value)
                hash_value(name, array, update)


def _folder(path: Path, inputs: tuple[InputSpec, ...]) -> FileSource:
    files = [p for p in path.iterdir() if p.suffix in (".npz", ".npy")]
    visible = sorted(p for p in files if not p.name.startswith("."))
    if not visible:
        raise DataError("the folder holds no .npz file", str(path), "One .npz per feed")
    return FileSource(str(path), visible, inputs)


def _feeds(source: Iterable[Any], inputs: tuple[InputSpec, ...]) -> FeedSource:
    feeds = []
    for position, feed in enumerate(source):
        if isinstance(feed, Mapping):
            feeds.append(feed)
        elif hasattr(feed, "__array__"):
            feeds.append(by_name({"": np.asarray(feed)}, inputs, f"feed {position}"))
        else:
            raise DataError(
                f"is {type(feed).__name__}",
                f"feed {position}",
                "A feed maps input names to arrays, or is the array of a single input",
            )
    return FeedSource("feeds", feeds, inputs)


def _arrays(
    where: str, arrays: Mapping[str, Array], inputs: tuple[InputSpec, ...], path: Path | None = None
) -> ArraySource:
    arrays = by_name(arrays, inputs, where)
    steps = {spec.name: _step(arrays[spec.name], spec, where) for spec in inputs}
    counts = {
        name: arrays[name].shape[0] // (step or 1)
        for name, step in steps.items()
        if step is not None
    }
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise DataError(
            f"the arrays hold different numbers of samples: {listed}",
            where,
            "One row of each per sample",
        )
    if not min(counts.values(), default=1):
        rows = ", ".join(f"{name} {arrays[name].shape[0]}" for name in counts)
        raise DataError(
            f"has too few samples for one feed: {rows}",
            where,
            f"The model takes {describe_inputs(inputs)}",
        )
    return ArraySource(where, arrays, steps, min(counts.values(), default=1), path)


def _step(array: Array, spec: InputSpec, where: str) -> int | None:
    """The rows of the array in a feed: 0 if one row without its axis, None if the whole array."""
    rank = len(array.shape)
    if rank == 0 and not spec.shape:
        return None
    if rank >= 1 and rank == len(spec.shape):
        return spec.batch
    if rank == len(spec.shape) + 1:
        return 0
    if rank and not spec.shape:
        return 1  # unknown rank
    raise DataError(
        f"has shape {array.shape}, which does not fit",
        f"{where}, {spec.name}",
        f"Samples of {spec}: as many axes, the first of which counts samples, or one axis more",
    )


def by_name(arrays: Mapping[str, T], inputs: Sequence[InputSpec], where: str) -> Mapping[str, T]:
    """One array per input. A single array for a single input may have any name.

    Raises: DataError if a name is missing, or is no input.
    """
    names = [spec.name for spec in inputs]
    if len(arrays) == len(names) == 1:
        return {names[0]: next(iter(arrays.values()))}
    if list(arrays) == [""]:
        raise DataError(
            f"is one array, but the model has {len(names)} inputs",
            where,
            f"One for each of {describe_inputs(inputs)}",
        )
    for name in arrays:
        if name not in names:
            raise DataError(f"{name!r} is no input of the model", where, did_you_mean(name, inputs))
    if missing := [s.name for s in inputs if s.name not in arrays and not s.is_optional]:
        raise DataError(
            f"lacks {', '.join(missing)}", where, f"The model takes {describe_inputs(inputs)}"
        )
    return arrays


def _batch_size(shapes: Mapping[str, tuple[int, ...]], inputs: Sequence[InputSpec]) -> int:
    """The samples in a feed: the first axis of an input whose batch is open, else of any input."""
    if len(shapes) == len(inputs) == 1:
        shapes = {inputs[0].name: next(iter(shapes.values()))}
    batched = [spec for spec in inputs if shapes.get(spec.name)]
    free = [spec for spec in batched if not (spec.shape and isinstance(spec.shape[0], int))]
    return next((shapes[spec.name][0] for spec in (*free, *batched)), 1)

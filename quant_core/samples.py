"""Which feeds a model is calibrated and judged with, read one at a time."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import onnxruntime as ort

from quant_core.errors import DataError, ModelError
from quant_core.session import Model, open_session
from quant_core.stored import Array, array_shapes, open_arrays, read_arrays

Feed = dict[str, np.ndarray]

RANDOM_COUNT = 16
RANDOM_SIDE = 224  # of a symbolic spatial axis of an image (rank 4)
RANDOM_LENGTH = 32  # of any other symbolic axis that is not the batch

DTYPES = {
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    "tensor(float16)": "float16",
    "tensor(bool)": "bool",
    "tensor(string)": "str",
    **{f"tensor({sign}int{bits})": f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)},
}

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class InputSpec:
    """What a model takes under one name. An axis is a size, a symbol, or None where anything goes.

    onnxruntime shows a scalar and an input of unknown rank alike: both have the shape ().
    """

    name: str
    dtype: np.dtype
    shape: tuple[int | str | None, ...]

    @property
    def batch(self) -> int:
        """Samples in one feed of this input: its first axis where that is fixed, else 1."""
        return self.shape[0] if self.shape and isinstance(self.shape[0], int) else 1

    def __str__(self) -> str:
        return f"{self.name} {self.dtype}[{', '.join('?' if d is None else str(d) for d in self.shape)}]"


@dataclass(frozen=True, slots=True, eq=False)
class Samples:
    """Feeds that fit a model: `samples[i]` reads and checks the i-th, iteration holds one at a time.

    order   positions in the source, in the order they are read
    labels  one row per sample of these feeds, in the same order, or None
    """

    inputs: tuple[InputSpec, ...]
    source: Source
    order: np.ndarray
    labels: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> Feed:
        """Raises: DataError, naming the file or sample, if a feed is not what the model takes or is not finite."""
        position = int(self.order[index])
        where = self.source.where(position)
        arrays = _by_name(self.source.read(position), self.inputs, where)
        return {spec.name: _fit(arrays[spec.name], spec, where) for spec in self.inputs}

    def __iter__(self) -> Iterator[Feed]:
        return (self[i] for i in range(len(self)))

    def where(self, index: int) -> str:
        """What a person calls the i-th feed."""
        return self.source.where(int(self.order[index]))

    def shard(self, k: int, n: int) -> Samples:
        """Every n-th feed from the k-th on; the n shards together hold every feed once."""
        if not 0 <= k < n:
            raise DataError(f"shard {k} of {n}", hint="From 0 to one less than the number of shards")
        return self._pick(np.arange(k, len(self), n))

    def digest(self) -> str:
        """Hex digest of what will be fed: file bytes or array bytes, which of them, and the labels."""
        digest = hashlib.blake2b(digest_size=20)
        self.source.hash_into(digest.update)
        digest.update(repr([(spec.name, spec.shape) for spec in self.inputs]).encode())
        digest.update(np.asarray(self.order, "<i8").tobytes())
        if self.labels is not None:
            _hash_array("labels", self.labels, digest.update)
        return digest.hexdigest()

    def _pick(self, indices: np.ndarray) -> Samples:
        labels = self.labels
        if labels is not None:
            sizes = [self.source.size(int(i)) for i in self.order]
            starts = np.cumsum([0, *sizes])
            rows = [labels[starts[i] : starts[i] + sizes[i]] for i in indices]
            labels = np.concatenate([labels[:0], *rows])
        return replace(self, order=self.order[indices], labels=labels)


def input_specs(model: Model | ort.InferenceSession) -> list[InputSpec]:
    """What a model must be fed. Raises: ModelError if it does not load, or takes something else than plain tensors."""
    session = model if isinstance(model, ort.InferenceSession) else open_session(model, optimize=False)
    for node in session.get_inputs():
        if node.type not in DTYPES:
            raise ModelError(f"takes {node.type}", node.name, "quantmill feeds tensors of numpy's types")
    return [
        InputSpec(node.name, np.dtype(DTYPES[node.type]), tuple(None if d in ("", -1, 0) else d for d in node.shape))
        for node in session.get_inputs()
    ]


def open_samples(
    source: str | Path | np.ndarray | Mapping[str, np.ndarray] | Iterable[Mapping[str, np.ndarray]],
    inputs: Sequence[InputSpec],
    *,
    count: int | None = None,
    shape: Mapping[str, Sequence[int]] | Sequence[int] | None = None,
    seed: int = 0,
    labels: str | Path | np.ndarray | None = None,
) -> Samples:
    """Samples for a model that takes `inputs`.

    source  .npy              the samples of a single-input model
            .npz              one array per input (a single-input model: any name)
            folder of them    one feed per file, in the order of the names, fed as stored
            "random"          seeded normal floats, 0 or 1 for integers; to try a model, not to calibrate it
            array, mapping of arrays, iterable of feeds: the same, from Python
            Of an array with the input's rank, the first axis is the sample and each feed takes as many as the model's
            batch axis is fixed to (else 1; a remainder is left out). Of an array with one axis more, or an array for
            a scalar input, each element is a feed. A scalar is fed every time.
    count   at most so many samples (of a folder: files; of an iterable: feeds), spread evenly over the source, so that
            data sorted by class keep every class
    shape   sizes for symbolic axes, {input: sizes} or the sizes for a single-input model, the batch axis optional
    labels  .npy or array whose first axis counts the samples of the whole source

    Values that the model's dtype holds exactly are converted (uint8 to float32, int64 to int32), floats are rounded
    to narrower floats, anything else is refused. Raises: DataError where the source, its names, its number of samples
    or the labels do not fit; what single feeds hold is checked when they are read.
    """
    specs = _pinned(inputs, shape)
    if count is not None and count < 1:
        raise DataError(f"count is {count}", hint="At least 1 sample")
    opened = _open(source, specs, count, seed)
    if not opened.length:
        raise DataError("holds no samples", opened.name, "At least one")
    samples = Samples(specs, opened, np.arange(opened.length), None if labels is None else _labels(labels, opened))
    per_feed = opened.size(0) if isinstance(opened, _Arrays) else 1
    feeds = len(samples) if count is None else max(1, count // per_feed)
    return samples if feeds >= len(samples) else samples._pick(np.arange(feeds) * len(samples) // feeds)


class Source(Protocol):
    """Where feeds come from, by position, not yet checked against the model."""

    @property
    def name(self) -> str: ...
    @property
    def length(self) -> int: ...
    def read(self, position: int) -> Mapping[str, np.ndarray]: ...
    def where(self, position: int) -> str: ...
    def size(self, position: int) -> int:
        """Samples in that feed, which is how many rows of labels belong to it."""
        ...

    def hash_into(self, update: Callable[[bytes], None]) -> None: ...


@dataclass(frozen=True, slots=True, eq=False)
class _Arrays:
    """Arrays of all samples; `steps` says how many rows of each make a feed (0: a row without its axis)."""

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
            _hash_file(self.path, update)
        else:
            for name, array in sorted(self.arrays.items()):
                _hash_array(name, np.asarray(array), update)


@dataclass(frozen=True, slots=True, eq=False)
class _Files:
    """A file per feed."""

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
            _hash_file(path, update)


@dataclass(frozen=True, slots=True, eq=False)
class _Feeds:
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
        return _batch_size({name: np.shape(array) for name, array in self.feeds[position].items()}, self.inputs)

    def hash_into(self, update: Callable[[bytes], None]) -> None:
        for feed in self.feeds:
            for name, array in sorted(feed.items()):
                _hash_array(name, np.asarray(array), update)


@dataclass(frozen=True, slots=True, eq=False)
class _Random:
    """Feeds drawn from (seed, position), so that they are the same however they are split."""

    inputs: Sequence[InputSpec]
    shapes: Mapping[str, tuple[int, ...]]
    seed: int
    length: int
    name: str = "random"

    def read(self, position: int) -> Feed:
        rng = np.random.default_rng([self.seed, position])
        return {spec.name: _draw(spec, self.shapes[spec.name], rng) for spec in self.inputs}

    def where(self, position: int) -> str:
        return f"random sample {position}"

    def size(self, position: int) -> int:
        return max((spec.batch for spec in self.inputs), default=1)

    def hash_into(self, update: Callable[[bytes], None]) -> None:
        update(repr(("random", self.seed, [(str(spec), self.shapes[spec.name]) for spec in self.inputs])).encode())


def _open(source: Any, inputs: tuple[InputSpec, ...], count: int | None, seed: int) -> Source:
    if isinstance(source, str) and source == "random":
        return _random(inputs, count or RANDOM_COUNT, seed)
    if isinstance(source, (str, Path)):
        path = Path(source)
        if path.is_dir():
            paths = sorted(p for p in path.iterdir() if p.suffix in (".npz", ".npy") and not p.name.startswith("."))
            if not paths:
                raise DataError("the folder holds no .npz file", str(path), "One .npz per feed")
            return _Files(str(path), paths, inputs)
        return _arrays(str(path), open_arrays(path), inputs, path)
    if isinstance(source, np.ndarray):
        return _arrays("array", {"": source}, inputs)
    if isinstance(source, Mapping):
        return _arrays("arrays", {str(name): np.asarray(array) for name, array in source.items()}, inputs)
    if isinstance(source, Iterable):
        feeds = list(source)
        for i, feed in enumerate(feeds):
            if not isinstance(feed, Mapping):
                raise DataError(f"is {type(feed).__name__}", f"feed {i}", "A feed maps input names to arrays")
        return _Feeds("feeds", feeds, inputs)
    raise DataError(f"is {source!r}", "samples", "A path, an array, a mapping of arrays, feeds, or 'random'")


def _arrays(
    where: str, arrays: Mapping[str, Array], inputs: tuple[InputSpec, ...], path: Path | None = None
) -> _Arrays:
    arrays = _by_name(arrays, inputs, where)
    steps = {spec.name: _step(arrays[spec.name], spec, where) for spec in inputs}
    counts = {n: arrays[n].shape[0] // (step or 1) for n, step in steps.items() if step is not None}
    if len(set(counts.values())) > 1:
        told = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise DataError(f"the arrays hold different numbers of samples: {told}", where, "One row of each per sample")
    if not min(counts.values(), default=1):
        rows = {name: arrays[name].shape[0] for name in counts}
        raise DataError(f"has too few samples for one feed: {rows}", where, f"The model takes {_told(inputs)}")
    return _Arrays(where, arrays, steps, min(counts.values(), default=1), path)


def _step(array: Array, spec: InputSpec, where: str) -> int | None:
    """Rows in a feed, 0 where a row is a feed without its axis, None where the array is fed as it is."""
    rank = len(array.shape)
    if rank == 0 and not spec.shape:
        return None
    if rank >= 1 and rank == len(spec.shape):
        return spec.batch
    if rank == len(spec.shape) + 1:
        return 0
    if rank and not spec.shape:
        return 1  # unknown rank
    raise DataError(f"has shape {array.shape}", f"{where}, {spec.name}", f"Samples of {spec}, or one axis more")


def _random(inputs: tuple[InputSpec, ...], count: int, seed: int) -> _Random:
    if seed < 0:
        raise DataError(f"seed is {seed}", hint="0 or more")
    batch_symbols = {spec.shape[0] for spec in inputs if spec.shape}
    shapes = {}
    for spec in inputs:
        if spec.dtype.kind == "U":
            raise DataError("takes text, for which there is no random", spec.name, "Give real samples")
        length = RANDOM_SIDE if len(spec.shape) == 4 else RANDOM_LENGTH
        shapes[spec.name] = tuple(
            d if isinstance(d, int) else 1 if axis == 0 or (d is not None and d in batch_symbols) else length
            for axis, d in enumerate(spec.shape)
        )
    feeds = count // max((spec.batch for spec in inputs), default=1)
    return _Random(inputs, shapes, seed, max(1, feeds))


def _draw(spec: InputSpec, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    if spec.dtype.kind == "f":
        return rng.standard_normal(shape).astype(spec.dtype)
    if "mask" in spec.name.lower():
        return np.ones(shape, spec.dtype)  # a row that is masked altogether is NaN in many models
    return rng.integers(0, 256 if spec.dtype == np.uint8 else 2, shape).astype(spec.dtype)  # in range of any table


def _pinned(inputs: Sequence[InputSpec], shape: Any) -> tuple[InputSpec, ...]:
    """The inputs with the axes that `shape` names fixed."""
    if shape is None:
        return tuple(inputs)
    if not isinstance(shape, Mapping):
        if len(inputs) != 1:
            raise DataError(f"is {shape!r}, but the model has {len(inputs)} inputs", "shape", "{input: sizes, ...}")
        shape = {inputs[0].name: shape}
    for name in shape:
        if name not in [spec.name for spec in inputs]:
            raise DataError(f"{name!r} is no input", "shape", _did_you_mean(name, inputs))
    return tuple(_pin(spec, shape[spec.name]) if spec.name in shape else spec for spec in inputs)


def _pin(spec: InputSpec, sizes: Sequence[int]) -> InputSpec:
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        raise DataError(f"is {list(sizes)}", f"shape of {spec.name}", f"Positive whole numbers that fit {spec}")
    wanted = [*spec.shape[: len(spec.shape) - len(sizes)], *sizes]
    missing = len(spec.shape) - len(sizes)
    fits = all(not isinstance(own, int) or own == size for own, size in zip(spec.shape, wanted, strict=False))
    if spec.shape and (missing not in (0, 1) or not fits):
        raise DataError(f"is {list(sizes)}", f"shape of {spec.name}", f"The model takes {spec}")
    return replace(spec, shape=tuple(wanted))


def _by_name(arrays: Mapping[str, T], inputs: Sequence[InputSpec], where: str) -> Mapping[str, T]:
    """One array per input. A single array for a single input may have any name."""
    names = [spec.name for spec in inputs]
    if len(arrays) == len(names) == 1:
        return {names[0]: next(iter(arrays.values()))}
    if list(arrays) == [""]:
        raise DataError(f"is one array, but the model has {len(names)} inputs", where, f"An .npz with {_told(inputs)}")
    for name in arrays:
        if name not in names:
            raise DataError(f"{name!r} is no input of the model", where, _did_you_mean(name, inputs))
    if missing := [name for name in names if name not in arrays]:
        raise DataError(f"lacks {', '.join(missing)}", where, f"The model takes {_told(inputs)}")
    return arrays


def _fit(array: np.ndarray, spec: InputSpec, where: str) -> np.ndarray:
    """The array as the model takes it, C-ordered and in the machine's byte order."""
    where, array = f"{where}, {spec.name}", np.asarray(array)
    sizes = zip(array.shape, spec.shape, strict=False)
    if spec.shape and (array.ndim != len(spec.shape) or any(isinstance(w, int) and g != w for g, w in sizes)):
        raise DataError(f"has shape {array.shape}", where, f"The model takes {spec}")
    array = _cast(array, spec, where)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        bad = np.argwhere(~np.isfinite(array))
        first = tuple(map(int, bad[0]))
        problem = (
            f"holds {len(bad)} values that are NaN or infinite as {array.dtype}, the first ({array[first]}) at {first}"
        )
        raise DataError(problem, where, "Repair or drop this sample")
    return array


def _cast(array: np.ndarray, spec: InputSpec, where: str) -> np.ndarray:
    got, wanted = array.dtype.kind, spec.dtype.kind
    if wanted == "U" == got:
        return array
    if got in "biuf" and wanted in "biuf" and (got != "f" or wanted == "f"):
        with np.errstate(over="ignore"):
            cast = np.ascontiguousarray(array, spec.dtype).reshape(array.shape)
        if got == wanted == "f" or np.can_cast(array.dtype, spec.dtype, "safe"):
            return cast
        changed = array != cast
        if not changed.any():
            return cast
        value = array[changed].flat[0]
        raise DataError(f"holds {value}, which {spec.dtype} cannot", where, f"The model takes {spec}")
    raise DataError(f"is {array.dtype}", where, f"The model takes {spec}")


def _batch_size(shapes: Mapping[str, tuple[int, ...]], inputs: Sequence[InputSpec]) -> int:
    """Samples in a feed: the first axis of the first input whose first axis is free, else of the first with one."""
    if len(shapes) == len(inputs) == 1:
        shapes = {inputs[0].name: next(iter(shapes.values()))}
    batched = [spec for spec in inputs if shapes.get(spec.name)]
    free = [spec for spec in batched if not (spec.shape and isinstance(spec.shape[0], int))]
    return next((shapes[spec.name][0] for spec in (*free, *batched)), 1)


def _labels(source: str | Path | np.ndarray, samples: Source) -> np.ndarray:
    """Labels for every sample of the source."""
    if isinstance(samples, _Random):
        raise DataError("random samples have no right answers", "labels", "Give real samples, or no labels")
    if isinstance(source, np.ndarray):
        labels, where = source, "labels"
    else:
        arrays, where = read_arrays(Path(source)), str(source)
        if len(arrays) != 1:
            raise DataError(f"holds {', '.join(arrays)}", where, "Labels are one array")
        labels = next(iter(arrays.values()))
    if labels.dtype.kind not in "biuf":
        raise DataError(f"labels are {labels.dtype}", where, "Whole numbers (class indices), below zero where ignored")
    if labels.dtype.kind == "f" and not np.isfinite(labels).all():
        raise DataError("labels are NaN or infinite", where, "Give every sample a label")
    expected = sum(samples.size(i) for i in range(samples.length))
    left_out = _left_out(samples)
    if labels.ndim == 0 or len(labels) != expected + left_out:
        got = "no axis" if labels.ndim == 0 else f"{len(labels)} rows"
        raise DataError(
            f"labels have {got} for {expected + left_out} samples", where, "One row per sample, in their order"
        )
    return labels[:expected]


def _left_out(samples: Source) -> int:
    """Rows at the end that do not fill a feed."""
    if not isinstance(samples, _Arrays):
        return 0
    batched = [samples.arrays[name].shape[0] % step for name, step in samples.steps.items() if step]
    return max(batched, default=0)


def _hash_file(path: Path, update: Callable[[bytes], None]) -> None:
    try:
        with path.open("rb") as file:
            update(f"file {path.stat().st_size}\n".encode())
            while block := file.read(1 << 20):
                update(block)
    except OSError as error:
        raise DataError(f"cannot be read: {error}", str(path), "Check the path") from error


def _hash_array(name: str, array: np.ndarray, update: Callable[[bytes], None]) -> None:
    update(f"array {name!r} {array.dtype.str} {array.shape}\n".encode())
    update(np.ascontiguousarray(array).tobytes())


def _did_you_mean(name: str, inputs: Sequence[InputSpec]) -> str:
    near = difflib.get_close_matches(name, [spec.name for spec in inputs], 1)
    return f"Did you mean {near[0]}? The model takes {_told(inputs)}" if near else f"The model takes {_told(inputs)}"


def _told(inputs: Sequence[InputSpec]) -> str:
    return ", ".join(map(str, inputs))

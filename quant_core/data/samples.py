"""Which feeds a model is calibrated and judged with, read one at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from quant_core.data.npz import read_arrays
from quant_core.data.sources import (
    ArraySource,
    Feed,
    InputSpec,
    RandomSource,
    Source,
    by_name,
    did_you_mean,
    hash_array,
    open_source,
)
from quant_core.errors import DataError, ModelError
from quant_core.model.session import Model, open_session

__all__ = ["Feed", "InputSpec", "Samples", "input_specs", "open_samples"]

DTYPES = {
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    "tensor(float16)": "float16",
    "tensor(bool)": "bool",
    "tensor(string)": "str",
    **{
        f"tensor({sign}int{bits})": f"{sign}int{bits}"
        for sign in ("", "u")
        for bits in (8, 16, 32, 64)
    },
}


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
        arrays = by_name(self.source.read(position), self.inputs, where)
        return {spec.name: _fit(arrays[spec.name], spec, where) for spec in self.inputs}

    def __iter__(self) -> Iterator[Feed]:
        return (self[i] for i in range(len(self)))

    def where(self, index: int) -> str:
        """What a person calls the i-th feed."""
        return self.source.where(int(self.order[index]))

    def shard(self, k: int, n: int) -> Samples:
        """Every n-th feed from the k-th on; the n shards together hold every feed once."""
        if not 0 <= k < n:
            raise DataError(
                f"shard {k} of {n}", hint="From 0 to one less than the number of shards"
            )
        return self._pick(np.arange(k, len(self), n))

    def apart(self, n: int) -> tuple[Samples, Samples]:
        """All feeds but every n-th, and every n-th."""
        chosen = np.arange(len(self)) % n == n - 1
        return self._pick(np.flatnonzero(~chosen)), self._pick(np.flatnonzero(chosen))

    def spread(self, most: int) -> Samples:
        """At most so many of the feeds, evenly spread."""
        return self if len(self) <= most else self._pick(np.arange(most) * len(self) // most)

    def feeds_as(self, other: Samples) -> bool:
        """Whether both feed the same, whatever their labels."""
        return replace(self, labels=None).digest() == replace(other, labels=None).digest()

    def digest(self) -> str:
        """Hex digest of what will be fed: file bytes or array bytes, which of them, and the labels."""
        digest = hashlib.blake2b(digest_size=20)
        self.source.hash_into(digest.update)
        digest.update(repr([(spec.name, spec.shape) for spec in self.inputs]).encode())
        digest.update(np.asarray(self.order, "<i8").tobytes())
        if self.labels is not None:
            hash_array("labels", self.labels, digest.update)
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
    session = (
        model if isinstance(model, ort.InferenceSession) else open_session(model, optimize=False)
    )
    for node in session.get_inputs():
        if node.type not in DTYPES:
            raise ModelError(
                f"takes {node.type}", node.name, "quantmill feeds tensors of numpy's types"
            )
    return [
        InputSpec(
            node.name,
            np.dtype(DTYPES[node.type]),
            tuple(None if d in ("", -1, 0) else d for d in node.shape),
        )
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
    opened = open_source(source, specs, count, seed)
    if not opened.length:
        raise DataError("holds no samples", opened.name, "At least one")
    samples = Samples(
        specs, opened, np.arange(opened.length), None if labels is None else _labels(labels, opened)
    )
    per_feed = opened.size(0) if isinstance(opened, ArraySource) else 1
    feeds = len(samples) if count is None else max(1, count // per_feed)
    return (
        samples
        if feeds >= len(samples)
        else samples._pick(np.arange(feeds) * len(samples) // feeds)
    )


def _pinned(inputs: Sequence[InputSpec], shape: Any) -> tuple[InputSpec, ...]:
    """The inputs with the axes that `shape` names fixed."""
    if shape is None:
        return tuple(inputs)
    if not isinstance(shape, Mapping):
        if len(inputs) != 1:
            raise DataError(
                f"is {shape!r}, but the model has {len(inputs)} inputs",
                "shape",
                "{input: sizes, ...}",
            )
        shape = {inputs[0].name: shape}
    for name in shape:
        if name not in [spec.name for spec in inputs]:
            raise DataError(f"{name!r} is no input", "shape", did_you_mean(name, inputs))
    return tuple(_pin(spec, shape[spec.name]) if spec.name in shape else spec for spec in inputs)


def _pin(spec: InputSpec, sizes: Sequence[int]) -> InputSpec:
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        raise DataError(
            f"is {list(sizes)}", f"shape of {spec.name}", f"Positive whole numbers that fit {spec}"
        )
    wanted = [*spec.shape[: len(spec.shape) - len(sizes)], *sizes]
    missing = len(spec.shape) - len(sizes)
    fits = all(
        not isinstance(own, int) or own == size
        for own, size in zip(spec.shape, wanted, strict=False)
    )
    if spec.shape and (missing not in (0, 1) or not fits):
        raise DataError(f"is {list(sizes)}", f"shape of {spec.name}", f"The model takes {spec}")
    return replace(spec, shape=tuple(wanted))


def _fit(array: np.ndarray, spec: InputSpec, where: str) -> np.ndarray:
    """The array as the model takes it, C-ordered and in the machine's byte order."""
    where, array = f"{where}, {spec.name}", np.asarray(array)
    sizes = zip(array.shape, spec.shape, strict=False)
    if spec.shape and (
        array.ndim != len(spec.shape) or any(isinstance(w, int) and g != w for g, w in sizes)
    ):
        raise DataError(f"has shape {array.shape}", where, f"The model takes {spec}")
    array = _cast(array, spec, where)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        bad = np.argwhere(~np.isfinite(array))
        first = tuple(map(int, bad[0]))
        problem = f"holds {len(bad)} values that are NaN or infinite as {array.dtype}, the first ({array[first]}) at {first}"
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
        raise DataError(
            f"holds {value}, which {spec.dtype} cannot", where, f"The model takes {spec}"
        )
    raise DataError(f"is {array.dtype}", where, f"The model takes {spec}")


def _labels(source: str | Path | np.ndarray, samples: Source) -> np.ndarray:
    """Labels for every sample of the source."""
    if isinstance(samples, RandomSource):
        raise DataError(
            "random samples have no right answers", "labels", "Give real samples, or no labels"
        )
    if isinstance(source, np.ndarray):
        labels, where = source, "labels"
    else:
        arrays, where = read_arrays(Path(source)), str(source)
        if len(arrays) != 1:
            raise DataError(f"holds {', '.join(arrays)}", where, "Labels are one array")
        labels = next(iter(arrays.values()))
    if labels.dtype.kind not in "biuf":
        raise DataError(
            f"labels are {labels.dtype}",
            where,
            "Whole numbers (class indices), below zero where ignored",
        )
    if labels.dtype.kind == "f" and not np.isfinite(labels).all():
        raise DataError("labels are NaN or infinite", where, "Give every sample a label")
    expected = sum(samples.size(i) for i in range(samples.length))
    left_out = _left_out(samples)
    if labels.ndim == 0 or len(labels) != expected + left_out:
        got = "no axis" if labels.ndim == 0 else f"{len(labels)} rows"
        raise DataError(
            f"labels have {got} for {expected + left_out} samples",
            where,
            "One row per sample, in their order",
        )
    return labels[:expected]


def _left_out(samples: Source) -> int:
    """Rows at the end that do not fill a feed."""
    if not isinstance(samples, ArraySource):
        return 0
    batched = [samples.arrays[name].shape[0] % step for name, step in samples.steps.items() if step]
    return max(batched, default=0)

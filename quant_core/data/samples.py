"""The feeds that a model is calibrated and evaluated with, read one at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from quant_core.data.npz import read_arrays
from quant_core.data.random_feeds import RandomSource, random_source
from quant_core.data.sources import (
    ArraySource,
    Feed,
    InputSpec,
    Source,
    by_name,
    did_you_mean,
    hash_array,
    open_source,
)
from quant_core.data.spec import RANDOM, SampleLabels, SampleSpec
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
    """Feeds that fit a model. `samples[i]` reads and checks the i-th; iteration holds one.

    order   positions in the source, in the order in which they are read
    labels  one row per sample of these feeds, in the same order, or None
    """

    inputs: tuple[InputSpec, ...]
    source: Source
    order: np.ndarray
    labels: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> Feed:
        """The i-th feed, as the model takes it.

        Raises: DataError, about the file or sample, if the model does not take it, or if a value is
        not finite.
        """
        position = int(self.order[index])
        where = self.source.where(position)
        arrays = by_name(self.source.read(position), self.inputs, where)
        return {spec.name: _fit(arrays[spec.name], spec, where) for spec in self.inputs}

    def __iter__(self) -> Iterator[Feed]:
        return (self[i] for i in range(len(self)))

    def where(self, index: int) -> str:
        """The name of the i-th feed for people."""
        return self.source.where(int(self.order[index]))

    def shard(self, k: int, n: int) -> Samples:
        """Every n-th feed from the k-th on; the n shards together hold every feed once."""
        if not 0 <= k < n:
            raise DataError(
                f"shard {k} of {n}", hint="From 0 to one less than the number of shards"
            )
        return self._pick(np.arange(k, len(self), n))

    def split_holdout(self, n: int) -> tuple[Samples, Samples]:
        """All feeds but every n-th, and every n-th."""
        is_held_out = np.arange(len(self)) % n == n - 1
        kept = self._pick(np.flatnonzero(~is_held_out))
        return kept, self._pick(np.flatnonzero(is_held_out))

    def subsample(self, most: int) -> Samples:
        """At most this many of the feeds, spread evenly."""
        if len(self) <= most:
            return self
        return self._pick(np.arange(most) * len(self) // most)

    def batch(self, size: int) -> Feed:
        """The first `size` samples as one feed; where there are fewer, they begin again.

        Inputs with a fixed first axis, such as a sampling rate, are those of the first sample.

        Raises: DataError if `size` is above 1 and every input's first axis is fixed.
        """
        first = self[0]
        if size == 1:
            return first
        joined = [s.name for s in self.inputs if s.shape and not isinstance(s.shape[0], int)]
        if not joined:
            shapes = ", ".join(map(str, self.inputs))
            raise DataError(f"cannot be {size}", "batch", f"The model fixes it: {shapes}")
        feeds = [self[i % len(self)] for i in range(size)]
        return first | {name: np.concatenate([feed[name] for feed in feeds]) for name in joined}

    def same_feeds(self, other: Samples) -> bool:
        """Whether both have the same feeds, whatever their labels."""
        own = replace(self, labels=None)
        return own.digest() == replace(other, labels=None).digest()

    def digest(self) -> str:
        """A hex digest of the source's bytes, of which feeds are taken, and of the labels."""
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
    """The inputs that a model must be fed.

    Raises: ModelError if it does not load, or has an input that is not a tensor of a numpy type.
    """
    session = model
    if not isinstance(session, ort.InferenceSession):
        session = open_session(session, optimize=False)
    specs = []
    for node in session.get_inputs():
        if node.type not in DTYPES:
            raise ModelError(
                f"takes {node.type}", node.name, "quantmill feeds tensors of numpy's types"
            )
        shape = tuple(None if size in ("", -1, 0) else size for size in node.shape)
        specs.append(InputSpec(node.name, np.dtype(DTYPES[node.type]), shape))
    return specs


def open_samples(
    spec: SampleSpec, inputs: Sequence[InputSpec], model: Path | None = None
) -> Samples:
    """The samples of `spec` for a model that takes `inputs`; open samples stay as they are.

    model  the file that random samples are drawn for: with them it runs and its outputs are finite

    Values that the model's dtype holds exactly are converted (uint8 to float32, int64 to int32),
    floats are rounded to narrower floats, anything else is refused.

    Raises: DataError if the source, its names, its number of samples, the shape or the labels do
    not fit the model. The content of a single feed is checked when it is read.
    """
    if isinstance(spec.source, Samples):
        return spec.source
    pinned = _pinned(inputs, spec.shape)
    source: Source
    if isinstance(spec.source, str) and spec.source == RANDOM:
        source = random_source(pinned, spec.count, spec.seed, model)
    else:
        source = open_source(spec.source, pinned)
    if not source.length:
        raise DataError("holds no samples", source.name, "At least one")
    labels = None if spec.labels is None else _labels(spec.labels, source)
    samples = Samples(pinned, source, np.arange(source.length), labels)
    if spec.count is None:
        return samples
    per_feed = source.size(0) if isinstance(source, ArraySource) else 1
    return samples.subsample(max(1, spec.count // per_feed))


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
    """The input with these sizes; without the first of them, the batch axis stays open."""
    missing = len(spec.shape) - len(sizes)
    wanted = [*spec.shape[:missing], *sizes]
    fits = _fits(wanted, spec.shape)
    if spec.shape and (missing not in (0, 1) or not fits):
        raise DataError(f"is {list(sizes)}", f"shape of {spec.name}", f"The model takes {spec}")
    return replace(spec, shape=tuple(wanted))


def _fits(sizes: Sequence[int | str | None], shape: Sequence[int | str | None]) -> bool:
    """Whether every axis that the shape fixes has that size."""
    pairs = zip(sizes, shape, strict=False)
    return all(not isinstance(fixed, int) or size == fixed for size, fixed in pairs)


def _fit(array: np.ndarray, spec: InputSpec, where: str) -> np.ndarray:
    """The array as the model takes it, C-ordered and in the machine's byte order."""
    where = f"{where}, {spec.name}"
    array = np.asarray(array)
    has_rank = array.ndim == len(spec.shape)
    if spec.shape and not (has_rank and _fits(array.shape, spec.shape)):
        raise DataError(f"has shape {array.shape}", where, f"The model takes {spec}")
    array = _cast(array, spec, where)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        if _masks(array, spec):
            return array
        bad = np.argwhere(~np.isfinite(array))
        first = tuple(map(int, bad[0]))
        raise DataError(
            f"holds {len(bad)} values that are NaN or infinite as {array.dtype}, "
            f"the first ({array[first]}) at {first}",
            where,
            "Repair or drop this sample",
        )
    return array


def _masks(array: np.ndarray, spec: InputSpec) -> bool:
    """Whether -inf, which Softmax makes 0, hides positions: others are 0, or the name says it."""
    shown = array[array != -np.inf]
    is_bias = any(word in spec.name.lower() for word in ("mask", "bias"))
    return bool(np.isfinite(shown).all() and (is_bias or not shown.any()))


def _cast(array: np.ndarray, spec: InputSpec, where: str) -> np.ndarray:
    """The array in the model's dtype. Raises: DataError if the dtype cannot hold its values."""
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


def _labels(source: SampleLabels, samples: Source) -> np.ndarray:
    """Labels for every sample of the source. Raises: DataError if there are others."""
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
    """The number of rows at the end that do not fill a feed."""
    if not isinstance(samples, ArraySource):
        return 0
    batched = [samples.arrays[name].shape[0] % step for name, step in samples.steps.items() if step]
    return max(batched, default=0)

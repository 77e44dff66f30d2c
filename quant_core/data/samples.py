"""The feeds that a model is calibrated and evaluated with, read one at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnxruntime as ort

from quant_core.data.fit import fit
from quant_core.data.flow import FlowSource
from quant_core.data.hashes import hash_array
from quant_core.data.input_spec import InputSpec
from quant_core.data.inputs import pinned_specs
from quant_core.data.npz import read_arrays
from quant_core.data.random_feeds import RandomSource, random_source
from quant_core.data.sources import ArraySource, Source, by_name, open_source
from quant_core.data.spec import SampleLabels, SampleSpec
from quant_core.data.splices import SplicedSource
from quant_core.errors import DataError
from quant_core.model.session import Feed

MAX_KEPT_BYTES = 64 << 20  # not tuned: to draw a feed, or read it, takes as long as a small model


@dataclass(frozen=True, slots=True, eq=False)
class Samples:
    """Feeds that fit a model. `samples[i]` reads and checks the i-th; iteration holds one.

    order   positions in the source, in the order in which they are read
    labels  one row per sample of these feeds, in the same order, or None
    kept    position -> its feed, of those that are in memory; None if none is ever kept there
    model   the file whose graph tells which inputs may lack values; None if none may
    """

    inputs: tuple[InputSpec, ...]
    source: Source
    order: np.ndarray
    labels: np.ndarray | None = None
    kept: dict[int, Feed] | None = None
    model: Path | None = None

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> Feed:
        """The i-th feed, as the model takes it.

        Raises: DataError, about the file or sample, if the model does not take it, or if a value is
        not finite and no rule of the model is for it.
        """
        position = int(self.order[index])
        if self.kept is not None and position in self.kept:
            return self.kept[position]
        arrays, where = self._read(position), self.where(index)
        feed = {s.name: fit(arrays.get(s.name), s, where, self.model) for s in self.inputs}
        if self.kept is not None and _bytes(feed, *self.kept.values()) <= MAX_KEPT_BYTES:
            self.kept[position] = feed
        return feed

    def __iter__(self) -> Iterator[Feed]:
        return (self[i] for i in range(len(self)))

    def keeping(self) -> Samples:
        """These samples for a caller that reads them repeatedly: few feeds are kept in memory."""
        return replace(self, kept={})

    @property
    def are_random(self) -> bool:
        """Whether they are drawn, or some are spliced at random, and not all given."""
        return isinstance(self.source, RandomSource | SplicedSource)

    def drawn_next(self, count: int) -> Samples:
        """The next `count` random samples, behind all that the source has given so far."""
        return replace(self, order=self.source.length + np.arange(count))

    def bytes_for_floats(self) -> list[str]:
        """The float inputs whose samples are bytes, as pixels are; by the first feed."""
        arrays = self._read(int(self.order[0]))
        floats = [spec.name for spec in self.inputs if spec.dtype.kind == "f"]
        return [name for name in floats if np.asarray(arrays.get(name)).dtype == np.uint8]

    def spliced(self, count: int) -> Samples:
        """These samples without labels, followed by splices of them: `count` samples in all."""
        source = SplicedSource(replace(self, labels=None).keeping(), count)
        return Samples(self.inputs, source, np.arange(count), model=self.model)

    def where(self, index: int) -> str:
        """The name of the i-th feed for people."""
        return self.source.where(int(self.order[index]))

    def shard(self, k: int, n: int) -> Samples:
        """Every n-th feed from the k-th on; the n shards together hold every feed once."""
        if not 0 <= k < n:
            raise DataError(
                f"shard {k} of {n}", hint="From 0 to one less than the number of shards"
            )
        return self.pick(np.arange(k, len(self), n))

    def split_holdout(self, n: int) -> tuple[Samples, Samples]:
        """All feeds but every n-th, and every n-th."""
        is_held_out = np.arange(len(self)) % n == n - 1
        kept = self.pick(np.flatnonzero(~is_held_out))
        return kept, self.pick(np.flatnonzero(is_held_out))

    def subsample(self, most: int) -> Samples:
        """At most this many of the feeds, spread evenly."""
        return self if len(self) <= most else self.pick(spread(most, len(self)))

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
        return {
            **first,
            **{name: np.concatenate([feed[name] for feed in feeds]) for name in joined},
        }

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

    def pick(self, indices: np.ndarray) -> Samples:
        """The feeds at these indices."""
        labels = self.labels
        if labels is not None:
            sizes = [self.source.size(int(i)) for i in self.order]
            starts = np.cumsum([0, *sizes])
            rows = [labels[starts[i] : starts[i] + sizes[i]] for i in indices]
            labels = np.concatenate([labels[:0], *rows])
        return replace(self, order=self.order[indices], labels=labels)

    def _read(self, position: int) -> Mapping[str, np.ndarray]:
        """The feed there as the source has it."""
        return by_name(self.source.read(position), self.inputs, self.source.where(position))


def spread(most: int, size: int) -> np.ndarray:
    """At most this many positions of a list of that size, spread evenly."""
    count = min(most, size)
    return np.arange(count) * size // max(count, 1)


def open_samples(
    spec: SampleSpec,
    inputs: Sequence[InputSpec],
    model: Path | None = None,
    session: ort.InferenceSession | None = None,
) -> Samples:
    """The samples of `spec` for a model that takes `inputs`; open samples stay as they are.

    model    the file that random samples are drawn for: with them it runs and its outputs are
             finite. It tells as well which values may be missing
    session  of that file, from callers that have one

    Values that the model's dtype holds exactly are converted (uint8 to float32, int64 to int32),
    floats are rounded to narrower floats, anything else is refused.

    Raises: DataError if the source, its names, its number of samples, the shape or the labels do
    not fit the model. The content of a single feed is checked when it is read.
    """
    if isinstance(spec.source, Samples):
        return spec.source
    if spec.flow is not None and model is not None:
        flow = FlowSource(model, inputs, spec.flow, spec)
        labels = None if spec.labels is None else _labels(spec.labels, flow)
        return Samples(flow.inputs, flow, np.arange(flow.length), labels)
    pinned = pinned_specs(inputs, spec.shape)
    source: Source
    if spec.is_random:
        source = random_source(pinned, spec.count, spec.seed, model, session)
    else:
        source = open_source(spec.source, pinned)
    if not source.length:
        raise DataError("holds no samples", source.name, "At least one")
    labels = None if spec.labels is None else _labels(spec.labels, source)
    samples = Samples(pinned, source, np.arange(source.length), labels, model=model)
    if spec.count is None:
        return samples
    per_feed = source.size(0) if isinstance(source, ArraySource) else 1
    return samples.subsample(max(1, spec.count // per_feed))


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


def _bytes(*feeds: Feed) -> int:
    return sum(array.nbytes for feed in feeds for array in feed.values())

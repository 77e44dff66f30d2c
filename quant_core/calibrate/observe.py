"""Calibration: run the float model on samples and collect the statistics that a plan needs."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quant_core.calibrate.gram import GramTally, RoundingTarget, load_grams, save_grams
from quant_core.calibrate.stats import ChannelMoments, TensorStats, merge_stats
from quant_core.calibrate.stats_files import load_stats, save_stats
from quant_core.calibrate.thinning import thinned
from quant_core.errors import DataError, ModelError
from quant_core.model.providers import find_provider
from quant_core.model.session import Feed, Model
from quant_core.model.values import numbered_values_of
from quant_core.plan.types import QuantPlan

# How many values of a tensor, and positions of each of its channels, one sample adds to histograms
# and means at least; minimum and maximum are of all values. Judge a change with `python -m
# tests.bench.calibration`; not tuned further.
MIN_VALUES = 8192
MIN_POSITIONS = 16
# The same of a tensor whose channels are not known, and that may lie along any axis.
MIN_SPREAD = 1 << 15
# Small samples wait until they are so many bytes, and are then counted at once: calls of numpy take
# longer than their arithmetic. Speed only.
WAITING_BYTES = 4 << 20

MeanKey = tuple[str, int]  # a tensor, and the axis of its channels


@dataclass(frozen=True, slots=True)
class Statistics:
    """What calibration knows of a model.

    tensors           tensor that may be quantized -> its values
    means             (input of a node with a weight, axis) -> the mean of each channel along it
    gram_matrices     node with a weight -> second moments of its input (gram.py); empty if not
                      collected
    rounding_targets  node with a weight -> what is rounded in its place (rewrite/sequential.py);
                      empty if each layer is rounded by itself
    samples           how many were observed
    """

    tensors: Mapping[str, TensorStats] = field(default_factory=dict)
    means: Mapping[MeanKey, ChannelMoments] = field(default_factory=dict)
    gram_matrices: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    rounding_targets: Mapping[str, RoundingTarget] = field(default_factory=dict)
    samples: int = 0

    def of_tensor(self, tensor: str) -> TensorStats:
        """The values of a tensor. Raises: ModelError if it was not observed."""
        if tensor not in self.tensors:
            raise ModelError(
                f"no statistics of tensor {tensor}", hint="Calibrate with the plan that is applied"
            )
        return self.tensors[tensor]

    @classmethod
    def merged(cls, shards: Iterable[Statistics]) -> Statistics:
        """The statistics of all shards together; their order does not matter to the last bit.

        Gram matrices are kept where one shard alone has samples.
        """
        shards = [shard for shard in shards if shard.samples]
        if len(shards) == 1:
            return shards[0]
        tensors = merge_stats(shard.tensors for shard in shards)
        means = merge_stats(shard.means for shard in shards)
        return cls(tensors, means, samples=sum(shard.samples for shard in shards))

    def of(self, tensors: Collection[str]) -> Statistics:
        """What is known of the values and the means of these tensors."""
        values = {name: stats for name, stats in self.tensors.items() if name in tensors}
        means = {key: found for key, found in self.means.items() if key[0] in tensors}
        return Statistics(values, means, samples=self.samples)

    def updated(self, newer: Statistics) -> Statistics:
        """These statistics, with the newer ones of values and means where there are such."""
        tensors = {**self.tensors, **newer.tensors}
        return replace(self, tensors=tensors, means={**self.means, **newer.means})


def save_parts(path: Path | str, parts: Sequence[Statistics]) -> None:
    """Write tensors, means and the number of samples of each part to a .npz file, and the Gram
    matrices of the first to one beside it; `load_parts` reads both.
    """
    found: dict[str, TensorStats | ChannelMoments] = {}
    for k, part in enumerate(parts):
        found |= {f"{k}:t:{name}": stats for name, stats in part.tensors.items()}
        found |= {f"{k}:m:{axis}:{name}": means for (name, axis), means in part.means.items()}
    save_stats(path, found, [part.samples for part in parts])
    if parts[0].gram_matrices:
        save_grams(_beside(path), parts[0].gram_matrices)


def load_parts(path: Path | str) -> list[Statistics]:
    """What `save_parts` wrote; without Gram matrices where their file was left behind.

    Raises: DataError if the file holds something else.
    """
    stored, counts = load_stats(path)
    tensors: list[dict[str, TensorStats]] = [{} for _ in counts]
    means: list[dict[MeanKey, ChannelMoments]] = [{} for _ in counts]
    for key, found in stored.items():
        part, kind, name = key.split(":", 2)
        if kind == "t":
            tensors[int(part)][name] = found
        else:
            axis, tensor = name.split(":", 1)
            means[int(part)][tensor, int(axis)] = found
    each = zip(tensors, means, counts, strict=True)
    parts = [Statistics(values, of_channels, samples=count) for values, of_channels, count in each]
    with suppress(OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
        parts[0] = replace(parts[0], gram_matrices=load_grams(_beside(path)))
    return parts


def observe(model: Model, plan: QuantPlan, feeds: Iterable[Feed]) -> Statistics:
    """The statistics of one shard of samples; memory does not grow with their number.

    The config's execution provider runs the model, or the CPU where that one does not work.

    Values that are NaN or infinite are left out: a model may mask rows of them later.

    Raises: DataError if there is no sample, or a sample gives a tensor no finite value.
    """
    return observe_each(model, plan, [feeds])[0]


def observe_each(
    model: Model,
    plan: QuantPlan,
    shards: Sequence[Iterable[Feed]],
    grams: GramTally | None = None,
) -> list[Statistics]:
    """The statistics of each of several shards of samples, for which the model is opened once.

    grams  is added up with the first shard, whose statistics then have its matrices

    Raises: as `observe`.
    """
    tallies = [_Tally(plan) for _ in shards]
    tally_of_feed: list[_Tally] = []

    def feeds() -> Iterator[Feed]:
        for tally, shard in zip(tallies, shards, strict=True):
            for feed in shard:
                tally_of_feed.append(tally)
                yield feed

    samples = numbered_values_of(
        model,
        dict.fromkeys((*tallies[0].wanted, *(grams.tensors if grams is not None else ()))),
        feeds(),
        where="calibration sample",
        provider=find_provider(plan.config.provider).name,
    )
    for position, values in samples:
        tally = tally_of_feed[position]
        if grams is not None and tally is tallies[0]:
            grams.add(position, values)
        tally.add({name: x for name, x in values.items() if name in tally.wanted})
    found = []
    for tally in tallies:
        tally.count_waiting()
        seen = tally_of_feed.count(tally)
        if not seen:
            raise DataError("no calibration samples", hint="At least one sample is needed")
        found.append(Statistics(tally.tensors, tally.means, samples=seen))
    if grams is not None:
        found[0] = replace(found[0], gram_matrices=grams.matrices())
    return found


class _Tally:
    """The statistics that a plan needs, of samples of which small ones are counted together.

    waiting  tensor and shape -> its values in samples that are not counted yet
    """

    def __init__(self, plan: QuantPlan) -> None:
        self.axes = plan.means
        self.tensors = {name: TensorStats() for name in plan.activations}
        self.means = {
            (name, axis): ChannelMoments(-1) for name in plan.means for axis in plan.means[name]
        }
        self.wanted = dict.fromkeys((*self.tensors, *plan.means))
        self.waiting: dict[tuple[str, tuple[int, ...]], list[NDArray[Any]]] = {}
        self.waiting_bytes = 0

    def add(self, values: Mapping[str, NDArray[Any]]) -> None:
        """Add the tensors of a sample. Raises: DataError if one has no finite value."""
        for name, x in values.items():
            self.waiting.setdefault((name, x.shape), []).append(x)
            self.waiting_bytes += x.nbytes
        if self.waiting_bytes >= WAITING_BYTES:
            self.count_waiting()

    def count_waiting(self) -> None:
        """Count the samples that wait. Raises: as `add`."""
        for (name, _), arrays in self.waiting.items():
            stack = np.stack(arrays) if len(arrays) > 1 else arrays[0][None]
            if not stack.size:
                continue
            bounds = _bounds(stack)
            if all(map(math.isfinite, bounds)):
                self._count(name, stack, bounds)
            else:
                for sample in stack:
                    self._count(name, sample[None])
        self.waiting.clear()
        self.waiting_bytes = 0

    def _count(self, name: str, x: NDArray[Any], bounds: tuple[float, float] | None = None) -> None:
        """Count values (samples, *shape) of a tensor.

        bounds  the least and the largest of them, if all are known to be finite
        """
        axes = self.axes.get(name, ())
        # an axis of the tensor that is counted from the left has the samples before it
        counted = {axis: _counted(x, axis + (axis >= 0)) for axis in axes}
        spread = x[:0] if axes else _spread(x)
        if bounds is None:
            x = _finite(x)
            bounds = _bounds(x)
            counted = {axis: _finite_rows(rows) for axis, rows in counted.items()}
            spread = spread[np.isfinite(spread)]
        if name in self.tensors:
            first = next(iter(counted.values()), spread)
            self.tensors[name].update(first if first.size else x, name, bounds)
        for axis in axes:
            self.means[name, axis].update(counted[axis], name)


def _beside(path: Path | str) -> Path:
    """Where the Gram matrices are that belong to the statistics in this file. The name begins with
    a dot, as they are large: stores are not sent what can be measured anew.
    """
    return Path(path).with_name(f".{Path(path).name}.grams")


def _bounds(x: NDArray[Any]) -> tuple[float, float]:
    """The least and the largest value, as float32 holds them; NaN if one of them is."""
    return float(np.float32(x.min())), float(np.float32(x.max()))


def _finite(x: NDArray[Any]) -> NDArray[Any]:
    """The finite values; all, if none is: the statistic then says what is wrong."""
    known = x[np.isfinite(x)]
    return known if known.size else x


def _finite_rows(x: NDArray[Any]) -> NDArray[Any]:
    """(n, C): the rows, channels last, of which every value is finite."""
    rows = x.reshape(-1, x.shape[-1]) if x.ndim else x.reshape(-1, 1)
    return np.asarray(rows[np.isfinite(rows).all(1)])


def _spread(x: NDArray[Any]) -> NDArray[Any]:
    """(samples, n): evenly spread values of each sample of x, at least MIN_SPREAD if it has them.

    The stride shares no divisor with the number of values: so each channel, row and column is seen,
    whichever axes they lie along.
    """
    size = math.prod(x.shape[1:])
    stride = max(1, size // MIN_SPREAD)
    while math.gcd(stride, size) > 1:
        stride -= 1
    return x.reshape(len(x), -1)[:, ::stride]


def _counted(x: NDArray[Any], channel_axis: int) -> NDArray[Any]:
    """The values that histograms and means count, channels last.

    Of images and signals that is a grid of positions, as counting all would be slow.
    """
    positions = max(MIN_POSITIONS, -(-MIN_VALUES // x.shape[channel_axis]))
    counted = thinned(x, channel_axis, positions)
    return np.ascontiguousarray(np.moveaxis(counted, channel_axis, -1))

"""What calibration sees: every planned tensor of the float model, one sample at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from quant_core.calibrate.gram import Aim
from quant_core.calibrate.ranges import find_range
from quant_core.calibrate.stats import (
    ChannelMoments,
    TensorStats,
    load_stats,
    merge_stats,
    save_stats,
    thinned,
)
from quant_core.errors import DataError, ModelError
from quant_core.model.session import Model, values_of
from quant_core.numerics.affine import Grid
from quant_core.plan.types import QuantPlan

# At least so many of a tensor's values and of each channel's positions count in one sample; its ends are those of all.
VALUES, POSITIONS = 8192, 16

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Statistics:
    """What calibration knows.

    tensors  of each tensor that may be quantized, its values
    means    of the input of each weighted node, the mean of each channel
    grams    of each weighted node, how its inputs vary together (gram.py); empty if not collected
    aims     of each weighted node, what rounding aims at once the layers before it are rounded (follow.py); or empty
    """

    tensors: Mapping[str, TensorStats] = field(default_factory=dict)
    means: Mapping[str, ChannelMoments] = field(default_factory=dict)
    grams: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    aims: Mapping[str, Aim] = field(default_factory=dict)
    memo: dict[Any, Any] = field(
        default_factory=dict, repr=False, compare=False
    )  # what was worked out from these

    def range(self, tensor: str, grid: Grid, method: str, percentile: float) -> tuple[float, float]:
        """The range of a tensor by a method, worked out once. Raises: ModelError if it was not observed."""
        if tensor not in self.tensors:
            raise ModelError(
                f"no statistics of tensor {tensor}", hint="Calibrate with the plan that is applied"
            )
        key = ("range", tensor, grid, method, percentile)
        if key not in self.memo:
            self.memo[key] = find_range(self.tensors[tensor], grid, method, percentile)
        return self.memo[key]  # type: ignore[no-any-return]

    @classmethod
    def merged(cls, parts: Iterable[Statistics]) -> Statistics:
        """All parts together; the order does not matter to the last bit."""
        parts = list(parts)
        return cls(merge_stats(p.tensors for p in parts), merge_stats(p.means for p in parts))

    def save(self, path: Path | str) -> None:
        save_stats(
            path,
            {f"t:{k}": v for k, v in self.tensors.items()}
            | {f"m:{k}": v for k, v in self.means.items()},
        )

    @classmethod
    def load(cls, path: Path | str) -> Statistics:
        """Raises: DataError if the file does not hold statistics."""
        stored = load_stats(path)
        return cls(
            {k[2:]: v for k, v in stored.items() if k[0] == "t"},
            {k[2:]: v for k, v in stored.items() if k[0] == "m"},
        )


def observe(
    model: Model, plan: QuantPlan, feeds: Iterable[Mapping[str, NDArray[Any]]], threads: int = 1
) -> Statistics:
    """The statistics of one shard of samples; memory does not grow with their number.

    Raises: DataError if there is no sample, or a tensor becomes NaN or infinite (the float model overflows).
    """
    tensors = {name: TensorStats() for name in plan.activations}
    means = {name: ChannelMoments(-1) for name in plan.means}
    wanted = dict.fromkeys((*tensors, *means))
    seen = 0
    for values in _ahead(
        values_of(model, wanted, feeds, threads=threads, where="calibration sample")
    ):
        for name in wanted:
            part = _counted(values[name], plan.means.get(name))
            if name in tensors:
                tensors[name].update(values[name], name, part)
            if name in means:
                means[name].update(part, name)
        seen += 1
    if not seen:
        raise DataError("no calibration samples", hint="At least one sample is needed")
    return Statistics(tensors, means)


def _counted(x: NDArray[Any], channel_axis: int | None) -> NDArray[Any]:
    """What histograms and means count of a tensor: of images and signals a part, as all would cost too much.

    Its channels come last, where they are fastest to count.
    """
    if channel_axis is None:
        return x
    part = thinned(x, channel_axis, max(POSITIONS, -(-VALUES // x.shape[channel_axis])))
    return np.ascontiguousarray(np.moveaxis(part, channel_axis, -1))


def _ahead(items: Iterator[T]) -> Iterator[T]:
    """The items; while one is in use, the next is made in another thread (inference and numpy let go of the lock)."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = pool.submit(next, items, None)
            yield item

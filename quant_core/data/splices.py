"""Samples spliced of given ones: a part of one stands in the place of the same part of another.

Source: Yun et al. 2019, CutMix (arXiv 1905.04899). Unlike samples that are mixed, or made noisy,
these keep the range, the type and the neighbourhoods of values. Here parts are those of one axis.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from quant_core.model.session import Feed

if TYPE_CHECKING:
    from quant_core.data.samples import Samples


@dataclass(frozen=True, slots=True, eq=False)
class SplicedSource:
    """The given feeds, followed by splices of two of them each: `length` feeds in all."""

    given: Samples
    length: int

    @property
    def name(self) -> str:
        return self.given.source.name

    def read(self, position: int) -> Feed:
        """The feed there. In a splice, the same share of every input's longest axis is replaced by
        that of another feed; inputs whose other sizes differ stay whole.
        """
        if position < len(self.given):
            return self.given[position]
        rng = np.random.default_rng(position)
        one, another = (self.given[int(i)] for i in rng.choice(len(self.given), 2, replace=False))
        begin, end = np.sort(rng.random(2))
        return {name: _spliced(x, another[name], begin, end) for name, x in one.items()}

    def where(self, position: int) -> str:
        is_given = position < len(self.given)
        return self.given.where(position) if is_given else f"{self.name}, two samples spliced"

    def size(self, position: int) -> int:
        return 1

    def hash_into(self, update: Callable[[bytes], None]) -> None:
        update(f"splices {self.given.digest()}".encode())


def _spliced(x: Any, other: Any, begin: float, end: float) -> Any:
    """A copy of `x` in which `other` fills the share of the longest axis from `begin` to `end`.

    `x` itself if it is no tensor, or if the shapes do not fit.
    """
    are_arrays = isinstance(x, np.ndarray) and isinstance(other, np.ndarray)
    if not are_arrays or x.dtype == object or x.size < 2 or x.ndim != other.ndim:
        return x
    axis = int(np.argmax(x.shape))
    size = min(x.shape[axis], other.shape[axis])
    part = [slice(None)] * x.ndim
    part[axis] = slice(int(begin * size), int(np.ceil(end * size)))
    if x[*part].shape != other[*part].shape:
        return x
    spliced = x.copy()
    spliced[*part] = other[*part]
    return spliced

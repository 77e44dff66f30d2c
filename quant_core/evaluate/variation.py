"""How much of an output differs from sample to sample.

Random samples may look alike to a model: then most of its outputs is the same for all, and what
would tell real samples apart is a small part of it, which noise may cover.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quant_core.evaluate.output_tally import BLOCK_ELEMENTS, MASK
from quant_core.numerics.sqnr import LEAST_VARIATION, sqnr_db

ROUNDED = 1e-6  # of a value: what differs by less is the same in float32


def varying_db(values: Iterable[NDArray[Any]]) -> float | None:
    """The variance between samples at the same place over that around the mean of all, in dB.

    values  of one output, an array for each sample

    -inf where samples differ by no more than float32 rounds; None of one sample, where samples
    have other shapes or masks, are strings, or are too large to add up. Values that hardly vary
    around their mean count as they are, as `OutputFidelity.centred_db` has it.
    """
    first: NDArray[np.float64] | None = None
    count, beyond, squares, total, square = 0, np.zeros(()), 0.0, 0.0, 0.0
    for value in values:
        if value.size > BLOCK_ELEMENTS or value.dtype.kind in "OSU":
            return None
        x = value.astype(np.float64)
        first = x if first is None else first
        if x.shape != first.shape or not (np.abs(x) < MASK).all():
            return None
        difference = x - first
        beyond = beyond + difference
        squares += float(np.square(difference).sum())
        total += float(x.sum())
        square += float(np.square(x).sum())
        count += 1
    if first is None or count < 2 or not first.size:
        return None
    between = (squares - float(np.square(beyond).sum()) / count) * count / (count - 1)
    centred = square - total**2 / (count * first.size)
    if between <= ROUNDED**2 * square:
        return -math.inf
    return sqnr_db(between, square if centred < LEAST_VARIATION**2 * square else centred)

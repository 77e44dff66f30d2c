"""The outputs of a model for every feed: one feed at a time, all of them, or spilled to files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from quant_core.data.samples import Samples
from quant_core.model.parallel import parallel_map
from quant_core.model.session import run
from quant_core.model.spill import SpilledArrays

Outputs = list[np.ndarray]  # of one feed, in the order of the model's outputs

MAX_STORED_BYTES = 64 << 20  # of the float model's outputs; not tuned


def run_each(session: ort.InferenceSession, samples: Samples) -> Iterator[Outputs]:
    """The outputs feed by feed, with a few feeds in memory at a time.

    Raises: DataError for a bad sample; ModelError if the model does not run.
    """
    return parallel_map(lambda at: run(session, at[1], samples.where(at[0])), enumerate(samples))


def run_all(session: ort.InferenceSession, samples: Samples) -> list[Outputs]:
    """The outputs of all feeds. Raises: as `run_each`."""
    return list(run_each(session, samples))


class StoredOutputs:
    """The outputs of a model for all feeds, for comparing many candidates with.

    Those beyond MAX_STORED_BYTES lie in a file, and are read one feed at a time.
    """

    def __init__(self, outputs: Iterable[Outputs]) -> None:
        self._arrays = SpilledArrays(MAX_STORED_BYTES)
        self._feeds: list[int] = []  # in the names of the arrays
        self.shapes: list[list[tuple[int, ...]]] = []  # of each feed's
        for feed, arrays in enumerate(outputs):
            self._arrays.update({f"{feed}/{i}": x for i, x in enumerate(arrays)})
            self._feeds.append(feed)
            self.shapes.append([x.shape for x in arrays])

    def pick(self, feeds: Iterable[int]) -> StoredOutputs:
        """The outputs for these feeds; the arrays are shared."""
        picked = StoredOutputs(())
        picked._arrays = self._arrays
        for feed in feeds:
            picked._feeds.append(self._feeds[feed])
            picked.shapes.append(self.shapes[feed])
        return picked

    def of(self, output: int) -> Iterator[NDArray[Any]]:
        """One of the outputs for each feed; the others are not read."""
        return (self._arrays[f"{feed}/{output}"] for feed in self._feeds)

    def __len__(self) -> int:
        return len(self.shapes)

    def __iter__(self) -> Iterator[Outputs]:
        return (self[feed] for feed in range(len(self)))

    def __getitem__(self, feed: int) -> Outputs:
        name = self._feeds[feed]
        return [self._arrays[f"{name}/{i}"] for i in range(len(self.shapes[feed]))]

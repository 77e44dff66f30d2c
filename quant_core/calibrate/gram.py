"""Gram matrices: the second moments of the inputs that a weight is multiplied by, which GPTQ needs.

A Gemm, MatMul or Conv multiplies its weight W, as a matrix (C, K), by rows x of K inputs: those of
the data for a matrix product, those of its im2col matrix for a convolution. Rounding W to Q costs
E[(W x - Q x)^2], which depends on the inputs through their Gram matrix G = E[x x^T] alone:

    E[((w - q) . x)^2] = (w - q)^T G (w - q)        for each row w of W and its rounded form q

Where a bias takes up the mean of that error (rewrite/bias_correction.py), G is about the mean of x.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quant_core.calibrate.matmul_inputs import MatmulInput, input_rows, split_columns
from quant_core.deadline import NO_DEADLINE, Deadline
from quant_core.model.session import Feed, Model
from quant_core.model.values import numbered_values_of

# How many rows are taken for each column of one matrix. Not tuned: of n rows, a k x k matrix has
# full rank only if n > k.
GRAM_ROWS_PER_COLUMN = 3
# The least rows of all matrices of one input, and of each for every column: a depthwise Conv has a
# small matrix for each of a thousand channels. Not tuned.
MIN_GRAM_ROWS = 1024
MIN_ROWS_PER_COLUMN = 16
LARGEST = 1e17  # of a value in a row: a thousand squares of larger ones exceed float32
ROWS_PER_PRODUCT = 512  # rows that are multiplied at once: enough for BLAS, few enough for memory
# Added to the diagonal, as a share of E[x^2]: some hundred times the rounding of float32 products
# (2^-24), which would otherwise make the variance of a nearly constant column negative. Not tuned
# further.
ROUNDING_NOISE = 1e-5

Feeds = Iterable[Feed]


@dataclass(frozen=True, slots=True, eq=False)
class RoundingTarget:
    """What is rounded in place of a weight after the layers before it (rewrite/sequential.py).

    weight        (C, K), W' of GPTAQ
    gram          (G, P, k, k), of the inputs in the rounded model, about their mean if the input is
                  centered
    output_means  (C,), mean outputs of the float weight for the float model's inputs, without its
                  bias
    input_means   (G, K), of the rounded model's inputs
    """

    weight: NDArray[np.float32]
    gram: NDArray[np.float32]
    output_means: NDArray[np.float64]
    input_means: NDArray[np.float64]

    def mean_shift(self, rounded: NDArray[Any]) -> NDArray[np.float64]:
        """(C,): what the bias must add for mean outputs to be those of the float model.

        rounded  (C, K), what the weight has become
        """
        grouped = rounded.astype(np.float64).reshape(len(self.input_means), -1, rounded.shape[1])
        means = np.einsum("gok,gk->go", grouped, self.input_means)
        return np.asarray(self.output_means - means.reshape(-1))


def gram_matrices(
    model: Model,
    inputs: Mapping[str, MatmulInput],
    feeds: Feeds,
    deadline: Deadline = NO_DEADLINE,
) -> dict[str, NDArray[np.float32]]:
    """Node -> Gram matrices (G, P, k, k) of its input rows, about their mean if it is centered.

    deadline  when it should end: then matrices are of fewer samples, or are missing

    Equal inputs share a matrix. Raises: ModelError if the model does not run.
    """
    if deadline.is_over:
        return {}
    feeds = list(feeds)
    tally = GramTally(inputs, range(len(feeds)))
    for position, values in numbered_values_of(model, tally.tensors, deadline.limit(feeds)):
        tally.add(position, values)
    return tally.matrices()


class GramTally:
    """Gram matrices of the inputs of nodes, summed up feed by feed.

    chosen  positions of the feeds that count, each of which gives as many rows
    """

    def __init__(self, inputs: Mapping[str, MatmulInput], chosen: Sequence[int]) -> None:
        self.inputs, self.chosen = inputs, frozenset(chosen)
        self._sums = {source: _MomentSums(source) for source in inputs.values()}

    @property
    def tensors(self) -> list[str]:
        """The names of what is to be added."""
        return [source.tensor for source in self._sums]

    def add(self, position: int, values: Mapping[str, NDArray[Any]]) -> None:
        """Add what a feed gives of the tensors, or of some of them; of others nothing is read."""
        if position not in self.chosen:
            return
        for source, total in self._sums.items():
            if source.tensor not in values:
                continue
            wanted = -(-_rows_of_each(source.groups, source.gram_shape[-1]) // len(self.chosen))
            total.add(input_rows(values[source.tensor], source, wanted))

    def matrices(self) -> dict[str, NDArray[np.float32]]:
        """The matrices as `gram_matrices` returns them. It can be called once."""
        found = {source: total.gram() for source, total in self._sums.items()}
        return {name: found[source] for name, source in self.inputs.items()}


def bytes_of(inputs: Mapping[str, MatmulInput]) -> int:
    """Bytes of the Gram matrices of these inputs."""
    return sum(4 * math.prod(source.gram_shape) for source in set(inputs.values()))


def save_grams(path: Path, grams: Mapping[str, NDArray[np.float32]]) -> None:
    """Write Gram matrices to one .npz file, each that nodes share once; `load_grams` reads it."""
    distinct = {id(gram): gram for gram in grams.values()}
    numbers = {of: f"gram{i}" for i, of in enumerate(distinct)}
    stored: dict[str, Any] = {numbers[of]: gram for of, gram in distinct.items()}
    which = [numbers[id(gram)] for gram in grams.values()]
    stored |= {"names": np.array([*grams], np.str_), "which": np.array(which, np.str_)}
    with path.open("wb") as file:
        np.savez(file, **stored)


def load_grams(path: Path) -> dict[str, NDArray[np.float32]]:
    """What `save_grams` wrote. Raises: OSError, ValueError or KeyError if it is something else."""
    with np.load(path, allow_pickle=False) as file:
        names, which = file["names"].tolist(), file["which"].tolist()
        found = {number: file[number] for number in dict.fromkeys(which)}
    return {name: found[number] for name, number in zip(names, which, strict=True)}


def _rows_of_each(groups: int, columns: int) -> int:
    """How many rows each of so many matrices is made of."""
    least = min(MIN_GRAM_ROWS, max(MIN_ROWS_PER_COLUMN * columns, MIN_GRAM_ROWS // groups))
    return max(least, GRAM_ROWS_PER_COLUMN * columns)


class ScaledGrams(Mapping[str, NDArray[np.float32]]):
    """The Gram matrices of a model whose channels were scaled (equalize.py), without samples.

    Scaling channel c of an input by f_c multiplies G[i, j] by f_i f_j. Each matrix is computed when
    it is read, so that none is held twice; those of inputs that did not change are the same arrays.

    factors  tensor -> (C,), by how much each channel has grown; a tensor that is missing did not
             change
    """

    def __init__(
        self,
        grams: Mapping[str, NDArray[np.float32]],
        inputs: Mapping[str, MatmulInput],
        factors: Mapping[str, NDArray[Any]],
    ) -> None:
        self.grams, self.inputs, self.factors = grams, inputs, factors

    def __getitem__(self, node: str) -> NDArray[np.float32]:
        gram, source = self.grams[node], self.inputs[node]
        if not self.has_changed(node):
            return gram
        groups, parts, k, _ = gram.shape
        channels = self.factors[source.tensor].reshape(groups, -1)
        # columns lie in the order (kernel..., C), so the channels repeat once for each position of
        # the kernel
        f = np.tile(channels, math.prod(source.kernel)).reshape(groups, parts, k)
        return np.asarray(gram * f[..., :, None] * f[..., None, :])

    def has_changed(self, node: str) -> bool:
        """Whether channels of the node's input were scaled."""
        return self.inputs[node].tensor in self.factors

    def __contains__(self, node: object) -> bool:
        return node in self.grams  # without computing one

    def __iter__(self) -> Iterator[str]:
        return iter(self.grams)

    def __len__(self) -> int:
        return len(self.grams)


class _MomentSums:
    """First and second moments of rows, summed a few hundred rows at a time.

    Second moments are summed in float32, as BLAS sums those of one time: the sums of all inputs
    take no more memory than their matrices.
    """

    def __init__(self, source: MatmulInput) -> None:
        self.source = source
        self.count = 0
        self.first = np.zeros(source.gram_shape[:3])
        self.second = np.zeros(source.gram_shape, np.float32)
        self.waiting: list[NDArray[np.float32]] = []

    def add(self, rows: NDArray[np.float32]) -> None:
        """Adds rows (G, n, K), but those with NaN or with squares that float32 cannot sum."""
        with np.errstate(invalid="ignore"):
            size = np.abs(rows)
            if not size.max(initial=0.0) < LARGEST:  # to pick rows copies them
                rows = rows[:, (size < LARGEST).all((0, 2))]
        if not rows.size:
            return
        self.waiting.append(rows)
        if sum(r.shape[1] for r in self.waiting) >= ROWS_PER_PRODUCT:
            self._flush()

    def gram(self) -> NDArray[np.float32]:
        """(G, P, k, k): E[x x^T], minus E[x] E[x]^T if the input is centered; once."""
        self._flush()
        n = max(self.count, 1)
        gram = self.second
        gram /= np.float32(n)
        squares = np.einsum("gpkk->gpk", gram)  # a view
        noise = ROUNDING_NOISE * squares
        if self.source.centered:
            mean = (self.first / n).astype(np.float32)
            gram -= mean[..., :, None] * mean[..., None, :]
        squares += noise
        return gram

    def _flush(self) -> None:
        if not self.waiting:
            return
        rows = np.concatenate(self.waiting, axis=1)
        self.waiting = []
        self.count += rows.shape[1]
        split = np.ascontiguousarray(split_columns(rows, self.source.parts))
        self.first += np.einsum("gpnk->gpk", split, dtype=np.float64)
        self.second += split.swapaxes(2, 3) @ split

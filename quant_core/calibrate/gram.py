"""How the inputs of a weight vary together: what rounding that compensates its own errors needs to know."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from quant_core.model import graph
from quant_core.model.session import Model, values_of
from quant_core.plan.operators import RULES, why_not_integer
from quant_core.plan.types import QuantPlan

ROWS_PER_COLUMN = 3  # rows of the im2col matrix that all feeds together add for each of its columns, evenly spread
ROUNDING_NOISE = 1e-5
LEAST_ROWS, ROWS_AT_ONCE = 1024, 512
MOST_COLUMNS = 1536  # of one matrix: factoring it takes the cube of that; wider weights get several, side by side
GROUP_BYTES = 256 << 20  # Gram matrices that are held at once


@dataclass(frozen=True, slots=True)
class Site:
    """Where a weight meets its input: enough to take the rows that the kernel multiplies it with."""

    tensor: str
    groups: int
    columns: int
    centered: bool
    kernel: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()

    @property
    def parts(self) -> int:
        """Into how many matrices of even size the columns are split; 0 where they cannot be."""
        least = -(-self.columns // MOST_COLUMNS)
        even = (
            p
            for p in range(least, self.columns)
            if self.columns % p == 0 and self.columns // p % 2 == 0
        )
        return 1 if least == 1 else next(even, 0)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the Gram matrices: groups, parts, columns of a part twice."""
        k = self.columns // self.parts
        return self.groups, self.parts, k, k


@dataclass(frozen=True, slots=True, eq=False)
class Aim:
    """What rounding a weight aims at, where the layers before it are rounded already (follow.py).

    rows     (C, K), what is rounded in place of the weight
    gram     (G, P, k, k), of the inputs that rounded layers leave, about their mean if the site is centered
    outputs  (C,), mean of what the float weight makes of the float inputs, without its bias
    means    (G, K), of the rounded model's inputs
    """

    rows: NDArray[np.float32]
    gram: NDArray[np.float32]
    outputs: NDArray[np.float64]
    means: NDArray[np.float64]

    def shift(self, values: NDArray[Any]) -> NDArray[np.float64]:
        """(C,): what the bias gives back, when the weight has become `values` (C, K)."""
        split = values.astype(np.float64).reshape(len(self.means), -1, values.shape[1])
        return np.asarray(self.outputs - np.einsum("gok,gk->go", split, self.means).reshape(-1))


def site_of(node: ir.Node, shape: tuple[int, ...]) -> Site | None:
    """The site of a Conv, Gemm or MatMul with a weight of this shape; None where rows cannot be taken."""
    tensor = graph.name_of(node.inputs[0])
    if node.op_type != "Conv":
        columns = shape[1] if graph.attribute(node, "transB", 0) else shape[0]
        return (
            Site(tensor, 1, columns, centered=node.op_type == "Gemm") if len(shape) == 2 else None
        )
    if graph.attribute(node, "auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return None
    rank = len(shape) - 2
    ones, zeros = (1,) * rank, (0,) * (2 * rank)
    return Site(
        tensor, graph.attribute(node, "group", 1), int(np.prod(shape[1:])), True, tuple(shape[2:]),
        tuple(graph.attribute(node, "strides", ones)), tuple(graph.attribute(node, "dilations", ones)),
        tuple(graph.attribute(node, "pads", zeros)),
    )  # fmt: skip


def sites_of(model: ir.Model, plan: QuantPlan) -> dict[str, Site]:
    """The sites of all planned anchors whose weight is rounded, by node."""
    planned = {n.node for n in plan.nodes if n.is_rounded}
    found = {}
    for node in model.graph:
        if (
            node.name in planned
            and RULES[node.op_type].kind == "anchor"
            and not why_not_integer(node)
        ):
            site = site_of(node, tuple(node.inputs[1].shape.numpy()))  # type: ignore[union-attr]
            if site is not None and site.parts:
                found[str(node.name)] = site
    return found


def grams(
    model: Model, sites: Mapping[str, Site], feeds: Iterable[Mapping[str, NDArray[Any]]]
) -> dict[str, NDArray[np.float32]]:
    """Node -> second moments of its input rows, (G, P, k, k); about their mean where a bias takes that up (correct.py).

    The samples are read once per some hundred MB of matrices.
    """
    found: dict[str, NDArray[np.float32]] = {}
    feeds = list(feeds)
    for part in _parts(sites):
        found |= _grams(model, part, feeds)
    return found


class ScaledGrams(Mapping[str, NDArray[np.float32]]):
    """Gram matrices of the same nodes once the channels of the tensors that they read are so many times as large.

    Each is worked out when it is asked for, so that none is held twice.
    """

    def __init__(
        self,
        grams: Mapping[str, NDArray[np.float32]],
        sites: Mapping[str, Site],
        factors: Mapping[str, NDArray[Any]],
    ) -> None:
        self.grams, self.sites, self.factors = grams, sites, factors

    def __getitem__(self, node: str) -> NDArray[np.float32]:
        gram, site = self.grams[node], self.sites[node]
        if site.tensor not in self.factors:
            return gram
        groups, parts, k, _ = gram.shape
        columns = np.tile(
            self.factors[site.tensor].reshape(groups, -1), math.prod(site.kernel)
        )  # (kernel..., C)
        columns = columns.reshape(groups, parts, k)
        return np.asarray(gram * columns[..., :, None] * columns[..., None, :])

    def __iter__(self) -> Iterator[str]:
        return iter(self.grams)

    def __len__(self) -> int:
        return len(self.grams)


def _parts(sites: Mapping[str, Site]) -> Iterator[dict[str, Site]]:
    part: dict[str, Site] = {}
    size = 0
    for name, site in sites.items():
        need = 8 * math.prod(site.shape)
        if part and size + need > GROUP_BYTES:
            yield part
            part, size = {}, 0
        part[name] = site
        size += need
    if part:
        yield part


def _grams(
    model: Model, sites: Mapping[str, Site], feeds: list[Mapping[str, NDArray[Any]]]
) -> dict[str, Any]:
    unique = dict.fromkeys(sites.values())
    sums = {site: _Sums(site) for site in unique}
    for values in values_of(model, (site.tensor for site in unique), feeds):
        for site in unique:
            wanted = -(-max(LEAST_ROWS, ROWS_PER_COLUMN * site.shape[-1]) // len(feeds))
            sums[site].add(rows_of(values[site.tensor], site, wanted))
    found = {site: total.moments() for site, total in sums.items()}
    return {name: found[site] for name, site in sites.items()}


class _Sums:
    """First and second moments of rows, added a few hundred at a time."""

    def __init__(self, site: Site) -> None:
        self.site, self.count = site, 0
        self.first, self.second = np.zeros(site.shape[:3]), np.zeros(site.shape)
        self.waiting: list[NDArray[np.float32]] = []

    def add(self, rows: NDArray[np.float32]) -> None:
        """Rows (G, n, K)."""
        self.waiting.append(rows)
        if sum(r.shape[1] for r in self.waiting) >= ROWS_AT_ONCE:
            self._flush()

    def moments(self) -> NDArray[np.float32]:
        """(G, P, k, k), as precisely as rounding needs them, about the mean if the site is centered."""
        self._flush()
        n = max(self.count, 1)
        mean = self.first / n * self.site.centered
        found = self.second / n - mean[..., :, None] * mean[..., None, :]
        # what a nearly constant column leaves is rounding noise of float32 products, which can be negative
        diagonal = np.arange(found.shape[-1])
        found[..., diagonal, diagonal] += ROUNDING_NOISE * self.second[..., diagonal, diagonal] / n
        return found.astype(np.float32)

    def _flush(self) -> None:
        if not self.waiting:
            return
        rows = np.concatenate(self.waiting, axis=1)
        self.waiting, self.count = [], self.count + rows.shape[1]
        parts = np.ascontiguousarray(
            rows.reshape(*rows.shape[:2], self.site.parts, -1).transpose(0, 2, 1, 3)
        )
        self.first += parts.sum(2, dtype=np.float64)
        for part, total in zip(
            parts.reshape(-1, *parts.shape[2:]),
            self.second.reshape(-1, *self.site.shape[2:]),
            strict=True,
        ):
            total += part.T @ part  # one by one: numpy hands only plain matrices to BLAS


def rows_of(x: NDArray[Any], site: Site, wanted: int) -> NDArray[np.float32]:
    """Evenly spread rows of the im2col matrix of each group: (G, rows, K), K in the order (kernel..., C)."""
    if not site.kernel:
        flat = x.reshape(-1, x.shape[-1])
        return flat[_spread(len(flat), wanted)][None].astype(np.float32)
    rank = len(site.kernel)
    pads = [(0, 0), (0, 0), *zip(site.pads[:rank], site.pads[rank:], strict=True)]
    padded = np.pad(x, pads) if any(site.pads) else x
    reach = [(k - 1) * d + 1 for k, d in zip(site.kernel, site.dilations, strict=True)]
    windows = np.lib.stride_tricks.sliding_window_view(
        padded, reach, axis=tuple(range(2, 2 + rank))
    )
    windows = windows[(slice(None), slice(None), *(slice(None, None, s) for s in site.strides))]
    windows = windows[(..., *(slice(None, None, d) for d in site.dilations))]  # type: ignore[arg-type]
    n, channels, *out = windows.shape[: 2 + rank]
    picked = np.unravel_index(_spread(n * int(np.prod(out)), wanted), (n, *out))
    rows = windows[(picked[0], slice(None), *picked[1:])]  # type: ignore[arg-type]  # (rows, C, kernel...)
    rows = rows.reshape(len(rows), site.groups, channels // site.groups, -1)
    return np.ascontiguousarray(
        rows.transpose(1, 0, 3, 2).reshape(site.groups, len(rows), -1), np.float32
    )


def _spread(n: int, wanted: int) -> NDArray[np.intp]:
    """Positions 0..n-1, at most so many, evenly spread."""
    if n <= wanted:
        return np.arange(n)
    return (np.arange(wanted) * n // wanted).astype(np.intp)

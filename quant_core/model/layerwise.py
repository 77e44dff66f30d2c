"""Running models layer by layer, while constants of layers that have not run yet still change."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, Protocol

import onnx_ir as ir
from numpy.typing import NDArray

from quant_core.model.kept import KeptArrays
from quant_core.model.session import open_session
from quant_core.model.session import run as run_session
from quant_core.model.subgraph import extract, nodes_before, producers_of, reads

# Tensors that are in memory between two layers, over all models and samples; others lie in files.
MAX_HELD_BYTES = 128 << 20


class Feeds(Protocol):
    """Feeds whose number is known before they are read."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Mapping[str, NDArray[Any]]]: ...


class LayerwiseRunner:
    """Runs models with the same nodes side by side over all samples, one stretch after another.

    states  for each model, for each sample: the tensors that nodes which have not run yet read
    """

    def __init__(self, models: tuple[ir.Model, ...], feeds: Feeds) -> None:
        self.models = models
        most_bytes = MAX_HELD_BYTES // max(1, len(models) * len(feeds))
        self.states = tuple([_kept(feed, most_bytes) for feed in feeds] for _ in models)
        self._nodes = list(models[0].graph)
        self._producers = producers_of(models[0])
        self._has_run: set[ir.Node] = set()

    def pending(self, tensors: Collection[str]) -> set[ir.Node]:
        """The nodes of the first model that must still run before these tensors are known."""
        return nodes_before(tensors, self._producers, self._has_run)

    def run_until(self, tensors: Collection[str]) -> None:
        """Runs all models until these tensors are known; drops what no later node reads.

        Raises: ModelError if the nodes that must run do not run as a model of their own.
        """
        pending = self.pending(tensors)
        self._has_run |= pending
        positions = [i for i, node in enumerate(self._nodes) if node in pending]
        later = self._read_later() | set(tensors)
        for model, states in zip(self.models, self.states, strict=True):
            if positions:
                nodes = list(model.graph)
                _run_nodes(model, [nodes[i] for i in positions], later, states)
            for state in states:
                for name in state.keys() - later:
                    del state[name]

    def _read_later(self) -> set[str]:
        waiting = (node for node in self._nodes if node not in self._has_run)
        return {str(v.name) for node in waiting for v in reads(node)}


def _kept(feed: Mapping[str, NDArray[Any]], most_bytes: int) -> KeptArrays:
    kept = KeptArrays(most_bytes)
    kept.update(feed)
    return kept


def _run_nodes(
    model: ir.Model, nodes: list[ir.Node], later: Collection[str], states: list[KeptArrays]
) -> None:
    """Runs these nodes on each state and adds their outputs that are read later to it."""
    session = open_session(extract(model, nodes, later, states[0]).SerializeToString())
    inputs = [v.name for v in session.get_inputs()]
    outputs = [v.name for v in session.get_outputs()]
    for state in states:
        found = run_session(session, {name: state[name] for name in inputs})
        state.update(zip(outputs, found, strict=True))

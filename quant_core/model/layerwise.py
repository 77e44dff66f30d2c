"""Running models layer by layer, while constants of layers that have not run yet still change."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from functools import partial
from typing import Protocol

import onnx_ir as ir

from quant_core.model.parallel import parallel_map
from quant_core.model.session import Feed, open_session, run_known
from quant_core.model.spill import SpilledArrays
from quant_core.model.subgraph import extract, nodes_before, producers_of, reads

# Tensors of one model that are in memory between two layers, over all samples; others lie in files.
MAX_HELD_BYTES = 64 << 20


class Feeds(Protocol):
    """Feeds whose number is known before they are read."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Feed]: ...


class LayerwiseRunner:
    """Runs a model over all samples, one stretch of nodes after another.

    states  for each sample: the tensors that nodes which have not run yet read
    """

    def __init__(self, model: ir.Model, feeds: Feeds) -> None:
        self.model = model
        most_bytes = MAX_HELD_BYTES // max(1, len(feeds))
        self.states = [_spilled(feed, most_bytes) for feed in feeds]
        self._producers = producers_of(model)
        self._has_run: set[ir.Node] = set()
        # constants change, tensors do not
        self._read = {node: {str(v.name) for v in reads(node)} for node in model.graph}

    def pending(self, tensors: Collection[str]) -> set[ir.Node]:
        """The nodes that must still run before these tensors are known."""
        return nodes_before(tensors, self._producers, self._has_run)

    def run_until(self, tensors: Collection[str]) -> None:
        """Runs the model until these tensors are known; drops what no later node reads.

        Raises: ModelError if the nodes that must run do not run as a model of their own.
        """
        pending = self.pending(tensors)
        self._has_run |= pending
        later = self._read_later() | set(tensors)
        if pending:
            nodes = [node for node in self.model.graph if node in pending]
            _run_nodes(self.model, nodes, later, self.states)
        for state in self.states:
            for name in state.keys() - later:
                del state[name]

    def _read_later(self) -> set[str]:
        waiting = (read for node, read in self._read.items() if node not in self._has_run)
        return set[str]().union(*waiting)


def _spilled(feed: Feed, most_bytes: int) -> SpilledArrays:
    spilled = SpilledArrays(most_bytes)
    spilled.update(feed)
    return spilled


def _run_nodes(
    model: ir.Model, nodes: list[ir.Node], later: Collection[str], states: list[SpilledArrays]
) -> None:
    """Runs these nodes on each state and adds their outputs that are read later to it."""
    session = open_session(extract(model, nodes, later, states[0]).SerializeToString())
    for state, found in zip(states, parallel_map(partial(run_known, session), states), strict=True):
        state.update(found)

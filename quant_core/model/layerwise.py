"""Running models layer by layer, while constants of layers that have not run yet still change."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray

from quant_core.model.session import open_session
from quant_core.model.session import run as run_session
from quant_core.model.subgraph import extract, reads

# Tensors that are held between two layers, over all models and samples; above, every second sample
# is dropped. Not tuned.
MAX_HELD_BYTES = 768 << 20

Tensors = dict[str, NDArray[Any]]


class LayerwiseRunner:
    """Runs models with the same nodes side by side over all samples, one stretch after another.

    states  for each model, for each sample: the tensors that nodes which have not run yet read
    """

    def __init__(
        self, models: tuple[ir.Model, ...], feeds: Iterable[Mapping[str, NDArray[Any]]]
    ) -> None:
        inputs = [dict(feed) for feed in feeds]
        self.models = models
        self.states: tuple[list[Tensors], ...] = tuple([dict(f) for f in inputs] for _ in models)
        self._nodes = list(models[0].graph)
        self._producers = {v.name: node for node in self._nodes for v in node.outputs}
        self._has_run: set[ir.Node] = set()

    def pending(self, tensors: Collection[str]) -> set[ir.Node]:
        """The nodes of the first model that must still run before these tensors are known."""
        found: set[ir.Node] = set()
        unknown = list(tensors)
        while unknown:
            node = self._producers.get(unknown.pop())
            if node is None or node in self._has_run or node in found:
                continue
            found.add(node)
            unknown += [str(v.name) for v in reads(node)]
        return found

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
        while len(self.states[0]) > 1 and self._held_bytes() > MAX_HELD_BYTES:
            for states in self.states:
                del states[1::2]

    def _read_later(self) -> set[str]:
        waiting = (node for node in self._nodes if node not in self._has_run)
        return {str(v.name) for node in waiting for v in reads(node)}

    def _held_bytes(self) -> int:
        tensors = (x for states in self.states for state in states for x in state.values())
        return sum(x.nbytes for x in tensors)


def _run_nodes(
    model: ir.Model, nodes: list[ir.Node], later: Collection[str], states: list[Tensors]
) -> None:
    """Runs these nodes on each state and adds their outputs that are read later to it."""
    session = open_session(extract(model, nodes, later, states[0]).SerializeToString())
    inputs = [v.name for v in session.get_inputs()]
    outputs = [v.name for v in session.get_outputs()]
    for state in states:
        found = run_session(session, {name: state[name] for name in inputs})
        state.update(zip(outputs, found, strict=True))

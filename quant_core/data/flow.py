"""The samples of a graph that is one of several of a model: feeds made when they are read."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from numpy.lib import format as npy

from quant_core.data.feeder import Feeder
from quant_core.data.following import BEHIND_ENCODER, Graph
from quant_core.data.hashes import hash_array
from quant_core.data.input_spec import InputSpec
from quant_core.data.inputs import input_specs, pinned_specs
from quant_core.data.spec import Flow, SampleShape, SampleSpec
from quant_core.errors import DataError, ModelError
from quant_core.model.runtime_errors import CustomOperatorError
from quant_core.model.session import Feed, open_session, output_names

# Name of an input of a decoder behind an encoder -> its name in the whole model.
WHOLE_NAMES = {
    "input_ids": "decoder_input_ids",
    "attention_mask": "decoder_attention_mask",
    "encoder_attention_mask": "attention_mask",
    "encoder_hidden_states": "last_hidden_state",
    "encoder_outputs": "last_hidden_state",
}


class FlowSource:
    """The feeds of a graph. Each is made when it is first read, and kept in an unnamed file.

    A decoder that can both begin and go on has two feeds for each sample, of which those at the
    token after the first ones stand before those at the first ones.
    """

    def __init__(
        self, model: Path, inputs: Sequence[InputSpec], flow: Flow, spec: SampleSpec
    ) -> None:
        """Raises: DataError if the samples do not fit, or a graph does not run on the first."""
        try:
            graphs = _open_graphs(model, inputs, flow, spec.shape)
            feeder = Feeder(graphs, flow, spec)
            self.inputs = tuple(graphs[-1].inputs.values())
            self.name, self.samples = feeder.name, feeder.samples
            self.length = feeder.samples * (2 if feeder.has_two_feeds else 1)
            self._feeder: Feeder | None = feeder
            self._kept: dict[int, dict[str, int]] = {}  # position -> input -> offset in the file
            self._file = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as its owner
            self.read(0)
        except ModelError as error:
            raise DataError(error.problem, error.where, error.hint) from error

    def read(self, position: int) -> Feed:
        """Raises: DataError or ModelError if a graph does not run on what it is fed."""
        if position not in self._kept:
            self._keep(position)
        feed = {}
        for name, offset in self._kept[position].items():
            self._file.seek(offset)
            feed[name] = npy.read_array(self._file)
        return feed

    def where(self, position: int) -> str:
        return f"{self.name}, sample {position % self.samples}"

    def size(self, position: int) -> int:
        return max((len(array) for array in self.read(position).values() if array.ndim), default=1)

    def hash_into(self, update: Callable[[bytes], None]) -> None:
        for position in range(self.length):
            for name, array in sorted(self.read(position).items()):
                hash_array(name, array, update)

    def _keep(self, position: int) -> None:
        assert self._feeder is not None
        feed = self._feeder.feed(position % self.samples, begins=position >= self.samples)
        offsets = {}
        for name, array in feed.items():
            offsets[name] = self._file.seek(0, 2)
            npy.write_array(self._file, array)
        self._kept[position] = offsets
        if len(self._kept) == self.length:
            self._feeder = None  # and with it the sessions of all graphs


def _open_graphs(
    model: Path, inputs: Sequence[InputSpec], flow: Flow, shape: SampleShape | None
) -> list[Graph]:
    """The graphs before the model whose outputs reach it, and the model itself.

    A graph before of operators that onnxruntime does not know, as a tokenizer's, is left out.

    Raises: ModelError if another graph does not load.
    """
    target = _open_graph(model, inputs, shape)
    graphs, needed = [target], set(target.inputs)
    for path in reversed(flow.before):
        try:
            graph = _open_graph(Path(path), None, shape)
        except CustomOperatorError:
            continue
        leaves_past = graph.gives_past and target.takes_past
        if leaves_past or not needed.isdisjoint(graph.outputs):
            graphs.insert(0, graph)
            needed |= set(graph.inputs)
    return graphs


def _open_graph(path: Path, inputs: Sequence[InputSpec] | None, shape: SampleShape | None) -> Graph:
    session = open_session(path, packed=False)
    specs = input_specs(session) if inputs is None else inputs
    if isinstance(shape, Mapping):  # it may name inputs of other graphs
        known = {spec.name for spec in specs}
        shape = {name: sizes for name, sizes in shape.items() if name in known}
    pinned = pinned_specs(specs, shape)
    is_behind = any(BEHIND_ENCODER.search(spec.name) for spec in pinned)
    named = {WHOLE_NAMES.get(s.name, s.name) if is_behind else s.name: s for s in pinned}
    return Graph(path, session, named, tuple(output_names(session)))

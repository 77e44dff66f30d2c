"""The values of inner tensors for each feed, no more of them at a time than memory should hold."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from threading import Lock
from typing import Any

import onnx
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from quant_core.model import files, graph
from quant_core.model.parallel import AT_ONCE
from quant_core.model.proto import from_proto
from quant_core.model.session import (
    CPU,
    Feed,
    Model,
    interface,
    open_session,
    run,
    run_known,
    sizes_of,
)
from quant_core.model.subgraph import extract, nodes_before, producers_of, reads

# Of the tensors that are read at a time, for one feed; small beside what onnxruntime takes.
MAX_PART_BYTES = 16 << 20
FLOAT_BYTES = 4  # of an element
NOT_TENSORS = ("Sequence", "Optional", "Map")  # in the names of operators that write others
TO_TENSORS = {"CastMap", "ConcatFromSequence", "OptionalHasElement", "SequenceAt", "SequenceLength"}

Tensors = dict[str, NDArray[Any]]


def values_of(
    model: Model, tensors: Iterable[str], feeds: Iterable[Feed], *, packed: bool = True
) -> Iterator[Tensors]:
    """The values of `numbered_values_of` without the positions of their feeds."""
    return (values for _, values in numbered_values_of(model, tensors, feeds, packed=packed))


def numbered_values_of(
    model: Model,
    tensors: Iterable[str],
    feeds: Iterable[Feed],
    *,
    packed: bool = True,
    where: str = "",
    provider: str = CPU,
) -> Iterator[tuple[int, Tensors]]:
    """For each feed its position and the values of these tensors by name, part by part: each tensor
    once, and its feeds in their order.

    Two feeds run at once, part by part in turns, while the parts before them are used: that saves
    time since inference and numpy release the interpreter lock.

    packed, provider  as `open_session` takes them
    where             what an error calls a feed; the feed's position follows it

    Raises: ModelError as `open_session` and `run`.
    """
    feeds = iter(feeds)
    first = next(feeds, None)
    if first is None:
        return
    parts = parts_of(model, tensors, first)
    runner = PartwiseRunner(model, parts, packed=packed, provider=provider)
    runs = (
        (position, runner.run(feed, where and f"{where} {position}"))
        for position, feed in enumerate(chain([first], feeds))
    )
    with ThreadPoolExecutor(AT_ONCE) as pool:
        coming: deque[tuple[int, Iterator[Tensors], Future[Tensors | None]]] = deque()
        while True:
            while len(coming) < AT_ONCE and (begun := next(runs, None)) is not None:
                coming.append((*begun, pool.submit(next, begun[1], None)))
            if not coming:
                return
            position, run_of_feed, part = coming.popleft()
            values = part.result()
            if values is not None:
                coming.append((position, run_of_feed, pool.submit(next, run_of_feed, None)))
                yield position, values


def parts_of(model: Model, tensors: Iterable[str], feed: Feed) -> list[list[str]]:
    """The tensors, in their order, in parts of at most MAX_PART_BYTES for this feed, or of one.

    All are one part if the model is too large for pieces in memory.

    Raises: ModelError if the model does not run.
    """
    tensors = list(dict.fromkeys(tensors))
    if len(tensors) < 2:
        return [tensors]
    sizes = _declared_sizes(model, tensors, feed)
    if sizes is None:
        sizes = sizes_of(model, tensors, feed)
    parts: list[list[str]] = [[]]
    left = MAX_PART_BYTES
    for name in tensors:
        size_bytes = FLOAT_BYTES * sizes[name]
        if parts[-1] and size_bytes > left:
            parts.append([])
            left = MAX_PART_BYTES
        parts[-1].append(name)
        left -= size_bytes
    return [tensors] if len(parts) < 2 or files.is_large(_parsed(model)) else parts


def _declared_sizes(model: Model, tensors: Collection[str], feed: Feed) -> dict[str, int] | None:
    """Elements of each of these tensors, where the model declares all of their sizes: a run without
    optimizers, which would tell, takes twice as long as one with them.
    """
    if not isinstance(model, ir.Model):
        return None
    computed = [value for node in model.graph for value in node.outputs]
    sizes = {
        str(value.name): math.prod(value.shape.numpy())
        for value in (*model.graph.inputs, *computed)
        if value.shape is not None and value.shape.is_static()
    }
    is_known = all(name in sizes for name in (*feed, *tensors))
    return {name: sizes[name] for name in tensors} if is_known else None


class PartwiseRunner:
    """Runs a model piece by piece; each piece computes one part of the tensors that are wanted.

    parts             names of inputs, inner tensors and outputs
    packed, provider  as `open_session` takes them

    Between two pieces only what later ones read is kept; sequences, maps and optionals are not, but
    computed again where a later piece reads them. A single piece is the whole model. Several feeds
    may run at once.
    """

    def __init__(
        self,
        model: Model,
        parts: Sequence[Collection[str]],
        *,
        packed: bool = True,
        provider: str = CPU,
    ) -> None:
        self._parts = parts
        self._model = model
        self._open = partial(open_session, packed=packed, provider=provider)
        self._session: ort.InferenceSession | None = None
        self._opening = Lock()
        self._pieces: list[Piece] = []
        self._read_later: list[set[str]] = []
        if len(parts) > 1:
            self._pieces, self._read_later = _pieces(_parsed(model), parts, self._open)

    def run(self, feed: Feed, where: str = "") -> Iterator[Tensors]:
        """The values of each part for this feed; `where` is the feed's name, for errors.

        Raises: ModelError if the model, or a piece of it, does not run.
        """
        if not self._pieces:
            for part in self._parts:
                yield self._run_whole(part, feed, where)
            return
        known = dict(feed)
        for piece, part, later in zip(self._pieces, self._parts, self._read_later, strict=True):
            if piece.nodes:
                known |= piece.run(known, where)
            yield {name: known[name] for name in part}
            known = {name: x for name, x in known.items() if name in later}

    def _run_whole(self, part: Collection[str], feed: Feed, where: str) -> Tensors:
        computed = [name for name in part if name not in feed]
        with self._opening:
            if computed and self._session is None:
                own = interface(self._model)
                inner = [name for name in computed if name not in own]
                self._session = self._open(self._model, outputs=inner)
        found = run(self._session, feed, where, computed) if computed else []
        given = {name: feed[name] for name in part if name in feed}
        return given | dict(zip(computed, found, strict=True))


@dataclass(slots=True, eq=False)
class Piece:
    """Nodes of a model that run by themselves.

    outputs  names of what they compute
    open     their session, for the first feed, which tells the types of what they read
    """

    model: ir.Model
    nodes: list[ir.Node]
    outputs: set[str]
    open: Callable[[bytes], ort.InferenceSession]
    _session: ort.InferenceSession | None = None
    _opening: Lock = field(default_factory=Lock)

    def run(self, known: Feed, where: str = "") -> Tensors:
        """The outputs by name, of tensors that are known. Raises: ModelError if it does not run."""
        with self._opening:
            if self._session is None:
                proto = extract(self.model, self.nodes, self.outputs, known)
                self._session = self.open(proto.SerializeToString())
        return run_known(self._session, known, where)


def _pieces(
    model: ir.Model,
    parts: Sequence[Collection[str]],
    open_piece: Callable[[bytes], ort.InferenceSession],
) -> tuple[list[Piece], list[set[str]]]:
    """One piece for each part, in their order, and names of what later pieces and parts read."""
    producers, has_run = producers_of(model), set[ir.Node]()
    found = []
    for part in parts:
        nodes = nodes_before(part, producers, has_run)
        has_run |= {node for node in nodes if all(map(_is_tensor, node.outputs))}
        ordered = [node for node in model.graph if node in nodes]
        found.append(Piece(model, ordered, set(part), open_piece))
    later: list[set[str]] = [set()]
    for piece, part in zip(reversed(found), reversed(parts), strict=True):
        piece.outputs |= later[0]
        read = (v for node in piece.nodes for v in reads(node))
        tensors = {str(v.name) for v in read if v.is_graph_input() or _is_tensor(v)}
        later.insert(0, later[0] | tensors | set(part))
    return found, later[1:]


def _parsed(model: Model) -> ir.Model:
    """The model; one in a file, or in its bytes, is read."""
    if isinstance(model, bytes):
        return from_proto(onnx.load_from_string(model))
    return files.read(Path(model)) if isinstance(model, (str, Path)) else model


def _is_tensor(value: ir.Value) -> bool:
    """Whether the value is a tensor, by its type or by what writes it."""
    if value.type is not None:
        return isinstance(value.type, (ir.TensorType, ir.SparseTensorType))
    node = value.producer()
    if node is None or node.op_type in TO_TENSORS:
        return True
    inside = (inner for g in graph.graphs_in(node) for inner in g.all_nodes())
    operators = (n.op_type for n in (node, *inside))
    return not any(word in operator for operator in operators for word in NOT_TENSORS)

"""Which nodes compute in float and which in integers, for every price of noise.

For a price p the least over all assignments of

    time + p * noise  =  sum over nodes of (its time + p * its noise, as it computes)
                       + sum over tensors of (the time of a conversion, if some of those that
                         write and read it compute in integers and some in float)

is a minimum cut: nodes on the source's side compute in integers, those on the sink's in float.
From p = 0 (the fastest) to no noise at all, assignments that are cheapest for some p are found by
halving: between two of them there is another only if it is cheaper for the price at which these
two cost the same.

Source: Greig, Porteous and Seheult 1989, Exact maximum a posteriori estimation for binary images;
Gallo, Grigoriadis and Tarjan 1989, A fast parametric maximum flow algorithm. Solved by networkx:
graphs have some hundred nodes, and scipy's maximum flow takes integers of 32 bits, returns no cut,
and weighs as much as all else that is installed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

UNIT = 1e-6  # of what a cut adds up, in milliseconds: integers keep the solver exact
DEPTH = 6  # of the halving: at most 63 cuts
STEP = 10**0.1  # of noise, 1 dB: assignments that are nearer to each other count as one
SOURCE, SINK = "source", "sink"

Nodes = frozenset[str]


@dataclass(frozen=True, slots=True)
class NodeCost:
    """What one node costs: milliseconds in integers and in float, and the noise of its integers."""

    integer_ms: float
    float_ms: float
    noise: float


@dataclass(frozen=True, slots=True)
class TensorCost:
    """What converting one tensor costs, and the nodes that it connects.

    writer   None if it is float whatever the nodes compute in, as inputs of the model are
    readers  nodes that read it
    is_read_in_float  whether something else reads it in float, as outputs of the model are
    """

    writer: str | None
    readers: tuple[str, ...]
    conversion_ms: float
    is_read_in_float: bool = False


@dataclass(frozen=True, slots=True)
class Assignment:
    """The nodes that compute in float, and what all cost together by the estimates."""

    in_float: Nodes
    compute_ms: float
    conversion_ms: float
    noise: float

    @property
    def ms(self) -> float:
        """The whole time."""
        return self.compute_ms + self.conversion_ms


def cheapest_assignments(
    nodes: Mapping[str, NodeCost], tensors: Sequence[TensorCost]
) -> list[Assignment]:
    """Assignments that are cheapest for some price of noise, the fastest first, the exact last."""
    in_float = _cut(nodes, tensors, 0.0, frozenset(), frozenset(nodes))
    fastest = assignment_of(nodes, tensors, in_float)
    exact = assignment_of(nodes, tensors, nodes)
    return [fastest, *_between(nodes, tensors, fastest, exact, DEPTH), exact]


def assignment_of(
    nodes: Mapping[str, NodeCost], tensors: Sequence[TensorCost], in_float: Collection[str]
) -> Assignment:
    """The assignment with these nodes in float."""
    return Assignment(
        frozenset(in_float),
        sum(c.float_ms if n in in_float else c.integer_ms for n, c in nodes.items()),
        sum(t.conversion_ms for t in tensors for _ in range(_conversions(t, in_float))),
        sum(c.noise for n, c in nodes.items() if n not in in_float),
    )


def _between(
    nodes: Mapping[str, NodeCost],
    tensors: Sequence[TensorCost],
    faster: Assignment,
    quieter: Assignment,
    depth: int,
) -> list[Assignment]:
    """Assignments between these two, both of which are cheapest for some price."""
    if not depth or quieter.noise * STEP >= faster.noise:
        return []
    price = (quieter.ms - faster.ms) / (faster.noise - quieter.noise)
    in_float = _cut(nodes, tensors, price, faster.in_float, quieter.in_float)
    middle = assignment_of(nodes, tensors, in_float)
    saved = faster.ms + price * faster.noise - (middle.ms + price * middle.noise)
    if saved <= len(nodes) * UNIT or middle.in_float in (faster.in_float, quieter.in_float):
        return []
    return [
        *_between(nodes, tensors, faster, middle, depth - 1),
        middle,
        *_between(nodes, tensors, middle, quieter, depth - 1),
    ]


def _cut(
    nodes: Mapping[str, NodeCost],
    tensors: Sequence[TensorCost],
    price: float,
    least: Nodes,
    most: Nodes,
) -> Nodes:
    """The nodes in float of the cheapest assignment: all of `least`, and others of `most`.

    Of a tensor with writer w and readers r, two auxiliary nodes make the conversion cost once:

        w -> a (its cost), a -> each r (infinite): w in integers, some r in float
        each r -> b (infinite), b -> w (its cost): some r in integers, w in float
    """
    import networkx as nx  # takes as long to import as numpy, and few searches need it

    open_nodes = most - least
    flow = nx.DiGraph()
    flow.add_nodes_from((SOURCE, SINK))

    def side(name: str) -> object:
        """A node of the flow: the one of that name, or the side that it is on for sure."""
        if name in open_nodes:
            return (name,)
        return SINK if name in least else SOURCE

    def add(start: object, end: object, ms: float) -> None:
        capacity = round(ms / UNIT)
        if flow.has_edge(start, end):
            capacity += flow[start][end]["capacity"]
        flow.add_edge(start, end, capacity=capacity)

    for name, cost in nodes.items():
        if name in open_nodes:
            add(SOURCE, (name,), cost.float_ms)
            add((name,), SINK, cost.integer_ms + price * cost.noise)
    for i, tensor in enumerate(tensors):
        if open_nodes.isdisjoint((tensor.writer, *tensor.readers)):
            continue
        writer = SINK if tensor.writer is None else side(tensor.writer)
        if tensor.is_read_in_float and tensor.writer is not None:
            add(writer, SINK, tensor.conversion_ms)
        elif tensor.writer is not None:
            add(writer, (i, "to float"), tensor.conversion_ms)
            for reader in tensor.readers:
                flow.add_edge((i, "to float"), side(reader))  # infinite
        for reader in tensor.readers:
            flow.add_edge(side(reader), (i, "to integers"))
        if tensor.readers:
            add((i, "to integers"), writer, tensor.conversion_ms)
    _, (in_integers, _) = nx.minimum_cut(flow, SOURCE, SINK)
    return least | {name for name in open_nodes if (name,) not in in_integers}


def _conversions(tensor: TensorCost, in_float: Collection[str]) -> int:
    """How often the tensor is converted: to float, to integers."""
    is_float = tensor.writer is None or tensor.writer in in_float
    if is_float:
        return int(any(reader not in in_float for reader in tensor.readers))
    return int(tensor.is_read_in_float or any(reader in in_float for reader in tensor.readers))

"""Which weights in 4 bits get finer or coarser blocks, or 8 bits: bytes go where noise is.

A uniform plan spends the same bits on each weight, though few layers make most of the output's
noise. Each step below takes some bytes and some noise away from a layer:

    blocks twice as wide -> blocks as configured -> half as wide -> a quarter -> 8 bits

Noise of layers adds up in the output, so that taking the steps in the order of noise per byte, as
far as the bytes go, makes the least noise that these bytes can buy (Lagrange; each step of a layer
gains less per byte than the one before it).

Source: Shoham and Gersho 1988, Efficient Bit Allocation for an Arbitrary Set of Quantizers
(IEEE TASSP 36 (9)).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from quant_core.calibrate.observe import Statistics
from quant_core.data.samples import Samples
from quant_core.deadline import Deadline
from quant_core.model import graph
from quant_core.model.session import Feed, open_session, run
from quant_core.numerics.granularity import PerBlock
from quant_core.numerics.round_nearest import BLOCK_MIN
from quant_core.plan.make import named_nodes, replan
from quant_core.plan.operators import RULES, weight_positions
from quant_core.plan.targets import TARGETS
from quant_core.plan.types import Compute, NodeChoice, NodePlan, QuantPlan, Storage
from quant_core.plan.weight_formats import is_folded
from quant_core.rewrite.bias_correction import bias_of
from quant_core.rewrite.rounding import Rounding
from quant_core.search.calibrated import CalibratedModel
from quant_core.search.policy import POLICY

# Blocks, in widths of the config's, from the coarsest on.
WIDTHS = (2.0, 1.0, 0.5, 0.25)
# Noise of blocks of half the width over that of whole ones. Steps are as wide as the largest weight
# of a block: this is the ratio of the mean squares of the largest of 16 and of 32 normal numbers.
OF_HALF_A_BLOCK = 0.80
MOST_NOISE = 1e6  # over the signal; not tuned, finite so that others can be compared
# Noise of 8 bits over that of 4: 16 times finer steps.
OF_8_BITS = 1 / 256


@dataclass(frozen=True, slots=True)
class Step:
    """More bytes for the weight of one node.

    noise   in the output, over its signal, that goes
    bytes   that come
    """

    node: str
    choice: NodeChoice
    noise: float
    bytes: float


def allocate_bits(calibrated: CalibratedModel, plan: QuantPlan, deadline: Deadline) -> QuantPlan:
    """The plan with other blocks or 8 bits for some of its weights in 4 bits.

    They take POLICY.allocated_share more bytes than those of the plan. Tables, weights that several
    nodes read, and nodes whose bits the config names stay. So do all where nothing was calibrated,
    or the deadline ends the measuring.

    Raises: ModelError if the model does not run.
    """
    if calibrated.samples is None or calibrated.stats is None:
        return plan
    nodes = _open_nodes(calibrated.model, plan)
    if len(nodes) < 2:
        return plan
    samples = calibrated.samples.subsample(POLICY.noise_samples)
    noise = isolated_noise(calibrated.model, plan, nodes, calibrated.stats, samples, deadline)
    if noise is None:
        return plan
    uniform = sum(n.elements * _bytes_of(n) for n in nodes)
    choices = cheapest_choices(nodes, noise, uniform * (1 + POLICY.allocated_share))
    return replan(calibrated.model, plan, choices)


def cheapest_choices(
    nodes: list[NodePlan], noise: Mapping[str, float], most_bytes: float
) -> dict[str, NodeChoice]:
    """Node -> its choice, of those that together leave the least noise in so many bytes.

    noise  node -> that of its blocks as they are planned, in the output
    """
    found = {}
    left = most_bytes
    steps: dict[str, Iterator[Step]] = {}
    waiting: list[Step] = []
    for planned in nodes:
        steps[planned.node] = _steps(planned, noise[planned.node])
        first = next(steps[planned.node])
        found[planned.node] = first.choice
        left -= first.bytes
    for of_node in steps.values():
        waiting += filter(None, [next(of_node, None)])
    while waiting:
        best = max(waiting, key=lambda step: step.noise / step.bytes)
        waiting.remove(best)
        if best.bytes > left:
            continue  # nor do its next ones fit, which take more
        found[best.node] = best.choice
        left -= best.bytes
        waiting += filter(None, [next(steps[best.node], None)])
    return found


def _steps(planned: NodePlan, noise: float) -> Iterator[Step]:
    """The steps of one weight: from its coarsest blocks, which cost no step, to 8 bits."""
    assert isinstance(planned.granularity, PerBlock)
    before_noise = before_bytes = 0.0
    for width in WIDTHS:
        size = round(planned.granularity.size * width)
        if size < BLOCK_MIN:
            continue
        found_noise = noise * OF_HALF_A_BLOCK ** -np.log2(width)
        found_bytes = planned.elements * _bytes_of(planned, width)
        choice = NodeChoice(granularity=PerBlock(size))
        yield Step(planned.node, choice, before_noise - found_noise, found_bytes - before_bytes)
        before_noise, before_bytes = found_noise, found_bytes
    choice = NodeChoice(storage=Storage.INT8)
    gained = before_noise - noise * OF_8_BITS
    yield Step(planned.node, choice, gained, planned.elements - before_bytes)


def _bytes_of(planned: NodePlan, width: float = 1.0) -> float:
    """The bytes of one element: 4 bits, and a share of the 4 bits of its block's multiplier."""
    assert isinstance(planned.granularity, PerBlock)
    return 0.5 + 0.5 / (planned.granularity.size * width)


def isolated_noise(
    model: ir.Model,
    plan: QuantPlan,
    nodes: list[NodePlan],
    stats: Statistics,
    samples: Samples,
    deadline: Deadline,
) -> dict[str, float] | None:
    """Node -> noise over signal of each output for each sample, summed, with its weight alone
    rounded to nearest.

    None if no output is float, or the deadline ends it before all are known.
    """
    session = _open_for_other_weights(model, nodes)
    is_float = [o.type == "tensor(float)" for o in session.get_outputs()]
    feeds = list(samples)
    exact = [_float_outputs(session, feed, is_float) for feed in feeds]
    found = {}
    for name, changed in _rounded(model, plan, nodes, stats):
        if deadline.is_over:
            return None
        outputs = (_float_outputs(session, {**feed, **changed}, is_float) for feed in feeds)
        found[name] = sum(map(_noise, exact, outputs))
    return found if any(found.values()) else None


def _noise(exact: Sequence[NDArray[Any]], found: Sequence[NDArray[Any]]) -> float:
    """Noise over signal, summed over outputs that can be compared."""
    total = 0.0
    for y, z in zip(exact, found, strict=True):
        signal = float(np.square(y, dtype=np.float64).sum())
        if signal and np.isfinite(signal) and y.shape == z.shape:
            ratio = float(np.square(y - z, dtype=np.float64).sum()) / signal
            # what is infinite or NaN only when rounded is noise too
            total += ratio if ratio < MOST_NOISE else MOST_NOISE
    return total


def _float_outputs(
    session: ort.InferenceSession, feed: Feed, is_float: list[bool]
) -> list[NDArray[np.float32]]:
    outputs = run(session, feed)
    return [y for y, wanted in zip(outputs, is_float, strict=True) if wanted]


def _rounded(
    model: ir.Model, plan: QuantPlan, nodes: list[NodePlan], stats: Statistics
) -> Iterator[tuple[str, Feed]]:
    """Node -> its rounded weight and the bias beside that, by the names of their values."""
    by_name = {str(n.name): n for n in model.graph}
    rounding = Rounding(plan, Statistics(stats.tensors, stats.means))
    for planned in nodes:
        node = by_name[planned.node]
        weight = _weight_of(node)
        rounded = rounding.integers(node, weight, planned)
        values = rounded.layout.tensor(rounded.integers.values, rounded.shape)
        values = values.reshape(graph.shape_of(weight)).astype(np.float32)  # groups side by side
        changed = {str(weight.name): values}
        bias, corrected = bias_of(node), rounding.corrected_bias(node, weight, rounded)
        if _is_own(bias) and corrected is not None:
            changed[str(bias.name)] = corrected.astype(np.float32)
        yield planned.node, changed


def _open_for_other_weights(model: ir.Model, nodes: list[NodePlan]) -> ort.InferenceSession:
    """The model with weights and biases of these nodes as inputs too, which feeds may leave out."""
    copy = model.clone()
    by_name = {str(n.name): n for n in copy.graph}
    for planned in nodes:
        node = by_name[planned.node]
        weight = _weight_of(node)
        weight.shape = ir.Shape(graph.shape_of(weight))  # without it some operators do not load
        bias = bias_of(node)
        if _is_own(bias):
            bias.shape = None  # a corrected one is (C,), its original may be one that broadcasts
        for value in filter(_is_own, (weight, bias)):
            value.type = ir.TensorType(ir.DataType.FLOAT)
            copy.graph.inputs.append(value)
    return open_session(copy)


def _open_nodes(model: ir.Model, plan: QuantPlan) -> list[NodePlan]:
    """The nodes whose bits may be chosen: with one weight of their own, in blocks of any width."""
    own = {str(n.name): n for n in model.graph}
    named = named_nodes(model, plan)
    found = []
    for planned in plan.nodes:
        node = own.get(planned.node)
        if node is None or planned.node in named or planned.storage is not Storage.INT4:
            continue
        if len(weight_positions(node)) != 1 or RULES[node.op_type].is_table:
            continue
        is_decoded = planned.compute.is_integer or is_folded(plan.config, TARGETS[plan.target])
        takes_any_block = is_decoded and planned.compute is not Compute.BLOCKS
        if takes_any_block and _is_own(_weight_of(node)):
            found.append(planned)
    return found


def _weight_of(node: ir.Node) -> ir.Value:
    (position,) = weight_positions(node)
    return graph.value(node.inputs[position])


def _is_own(value: ir.Value | None) -> TypeGuard[ir.Value]:
    """Whether it is an initializer of the main graph that one node reads."""
    if value is None:
        return False
    return value.is_initializer() and not value.is_graph_input() and len(value.uses()) == 1

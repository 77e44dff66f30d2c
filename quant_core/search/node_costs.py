"""What each node of a candidate costs in integers and in float: its time and its noise.

Times are those of the runtime's kernels when the whole candidate and the whole float model run, and
add up to within some percent. Noise is that of each node alone, over the signal of its output: it
ranks nodes well, but does not add up, so that nothing is predicted from it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import cache, partial

import numpy as np
import onnx_ir as ir

from quant_core.evaluate.in_openvino import profile_in_openvino
from quant_core.evaluate.kernels import Kernel, profile_kernels
from quant_core.evaluate.node_noise import isolated_db
from quant_core.evaluate.timing_cache import Cost
from quant_core.model import graph
from quant_core.model.session import sizes_of
from quant_core.plan.static_nodes import capped_output, data_inputs
from quant_core.plan.targets import TARGETS, Runtime
from quant_core.plan.types import Compute, QuantPlan
from quant_core.rewrite.apply import spell_out
from quant_core.search.bench import Bench
from quant_core.search.candidate import Candidate
from quant_core.search.minimum_cut import NodeCost, TensorCost
from quant_core.search.policy import POLICY

# Around kernels of another layout: onnxruntime's, and OpenVINO's.
REORDERS = {"ReorderInput", "ReorderOutput", "Reorder"}
ELEMENTS = 1 << 16  # of the tensor that tells what a conversion costs
LEAST_MS = 1e-6  # of a node whose kernels were fused into others'

Profiles = Callable[[], list[list[Kernel]]]  # of the float model and of a candidate


def node_costs(
    model: ir.Model, candidate: Candidate, bench: Bench
) -> tuple[dict[str, NodeCost], list[TensorCost]]:
    """The costs of all nodes that compute in integers, and of the tensors between them.

    model  the float model that the candidate is made of
    bench  noise is measured on some of its samples, times and sizes on the first

    If the candidate cannot be timed here, times are the target's, for each weight, and
    conversions cost nothing. Raises: ModelError if a model does not run.
    """
    few = bench.samples.subsample(_enough_for_noise(candidate))
    noise = {
        node: float(10 ** (-db / 10))
        for node, db in isolated_db(model, candidate.model, few).items()
    }
    own = {node.name for node in model.graph}  # what a loop computes is not timed by itself
    integer = [n for n in candidate.plan.nodes if n.compute.is_integer and n.node in own]
    if bench.timed_in is None:
        times = TARGETS[candidate.plan.target].times
        return {
            n.node: NodeCost(
                n.elements * times.get(n.compute, 1.0), float(n.elements), noise.get(n.node, 0.0)
            )
            for n in integer
        }, []
    profiles = cache(partial(_profiled, model, candidate, bench))
    timed = _node_times(candidate, bench, profiles)
    costs = {
        n.node: NodeCost(timed[n.node].quantized_ms, timed[n.node].float_ms, noise.get(n.node, 0.0))
        for n in integer
    }
    conversion = bench.costs.of(f"{ELEMENTS} conversions", _time_of_conversions)
    sizes = sizes_of(model, candidate.plan.activations, bench.samples[0])
    ms = conversion.float_ms / ELEMENTS
    timed_ms = None
    if bench.timed_in is Runtime.OPENVINO:
        timed_ms = _conversion_times(candidate, bench, profiles)
    return costs, tensor_costs(model, candidate.plan, sizes, ms, timed_ms)


def _enough_for_noise(candidate: Candidate) -> int:
    """How many samples tell the noise of single nodes: fewer of a slow model, by its timed cost."""
    if candidate.cost is None:
        return POLICY.noise_samples
    run_soon = int(1e3 * POLICY.noise_s / candidate.cost.float_ms)
    return min(max(run_soon, POLICY.least_noise_samples), POLICY.noise_samples)


def _profiled(model: ir.Model, candidate: Candidate, bench: Bench) -> list[list[Kernel]]:
    """The kernels of the float model and of the candidate, timed where the bench times."""
    rival = model.clone()
    spell_out(rival, TARGETS[candidate.plan.target])
    models, feed = [rival, candidate.model], bench.samples[0]
    if bench.timed_in is Runtime.OPENVINO:
        return profile_in_openvino(models, feed)
    return [profile_kernels(model, feed, seconds=POLICY.profile_seconds) for model in models]


def _node_times(candidate: Candidate, bench: Bench, profiles: Profiles) -> dict[str, Cost]:
    """Node that computes in integers -> its time, from the timing cache where it knows it."""
    names = {n.node: n.node for n in candidate.plan.nodes if n.compute.is_integer}
    written = {str(node.name): name for name, node in candidate.quantized.written.items()}
    weighted = {n.node for n in candidate.plan.weighted}

    @cache
    def times() -> tuple[dict[str, float], dict[str, float]]:
        in_float, quantized = profiles()
        in_integers = _milliseconds(quantized, names | written, weighted)
        return _milliseconds(in_float, names, weighted), in_integers

    def measured(name: str) -> Cost:
        float_ms, quantized_ms = (max(ms.get(name, 0.0), LEAST_MS) for ms in times())
        return Cost(float_ms, float_ms / quantized_ms)

    what = bench.described(candidate.plan, bench.samples[0])
    return {
        name: bench.costs.of(f"node {name} of {what}", partial(measured, name)) for name in names
    }


def _conversion_times(candidate: Candidate, bench: Bench, profiles: Profiles) -> dict[str, float]:
    """Activation -> the time of kernels that do nothing but quantize it.

    OpenVINO does most conversions in the kernel that writes the tensor, where they cost nothing.
    """
    quantizes = {
        str(node.name): graph.name_of(node.inputs[0])
        for node in candidate.model.graph
        if node.op_type == "QuantizeLinear"
    }

    @cache
    def times() -> dict[str, float]:
        own = [k for k in profiles()[1] if k.covers and quantizes.keys() >= set(k.covers)]
        return _milliseconds(own, quantizes, ())

    def measured(tensor: str) -> Cost:
        return Cost(max(times().get(tensor, 0.0), LEAST_MS), 1.0)

    what = bench.described(candidate.plan, bench.samples[0])
    costs = {
        tensor: bench.costs.of(f"conversion of {tensor} of {what}", partial(measured, tensor))
        for tensor in candidate.plan.activations
    }
    return {tensor: cost.float_ms for tensor, cost in costs.items()}


def _milliseconds(
    kernels: Iterable[Kernel], names: Mapping[str, str], weighted: Collection[str]
) -> dict[str, float]:
    """Planned node -> the time of the kernels that stand for it.

    names     node of the model -> planned node
    weighted  planned nodes with weights

    A kernel's time is shared by the planned nodes that it stands for; by those with weights alone,
    if there are some: what is fused with them costs next to nothing. Reorders of the layout stand
    for none: they are paid by all, in proportion.
    """
    times: defaultdict[str, float] = defaultdict(float)
    reorders = 0.0
    for kernel in kernels:
        planned = [names[node] for node in kernel.covers if node in names]
        planned = [name for name in planned if name in weighted] or planned
        for name in planned:
            times[name] += kernel.ms / len(planned)
        if kernel.op_type in REORDERS:
            reorders += kernel.ms
    share = 1 + reorders / max(sum(times.values()), LEAST_MS)
    return {name: share * ms for name, ms in times.items()}


def tensor_costs(
    model: ir.Model,
    plan: QuantPlan,
    sizes: Mapping[str, int],
    conversion_ms: float,
    timed_ms: Mapping[str, float] | None = None,
) -> list[TensorCost]:
    """What conversions cost of the tensors that static nodes write or read.

    sizes          tensor -> its elements, for every activation of the plan
    conversion_ms  of one element
    timed_ms       activation -> what its conversion takes if no static node writes it, where that
                   was timed
    """
    static = {n.node for n in plan.nodes if n.compute is Compute.STATIC}
    nodes = [n for n in model.graph if n.name in static]
    writers = {capped_output(node): str(node.name) for node in nodes}
    values = {v.name: v for v in (*model.graph.inputs, *writers)}
    values |= {v.name: v for node in nodes for v in (*data_inputs(node), *node.outputs)}
    found = []
    for tensor in plan.activations:
        value = values[tensor]
        readers = {str(n.name): n.name in static for n in graph.consumers(value)}
        producer = value.producer()
        writer = writers.get(value)
        if writer is None and producer is not None and producer.name in static:
            writer = str(producer.name)  # one of several outputs
        ms = conversion_ms * sizes[tensor]
        if timed_ms is not None and writer is None:
            ms = timed_ms[tensor]
        found.append(
            TensorCost(
                writer,
                tuple(name for name, is_static in readers.items() if is_static),
                ms,
                is_read_in_float=not all(readers.values()) or value.is_graph_output(),
            )
        )
    return found


def _time_of_conversions() -> Cost:
    """What it takes to quantize ELEMENTS values or to make them float again: the mean of both."""
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([ELEMENTS]))
    scale = ir.Value(name="scale", const_value=ir.tensor(np.float32(0.1), name="scale"))
    zero = ir.Value(name="zero", const_value=ir.tensor(np.uint8(128), name="zero"))
    there = ir.node("QuantizeLinear", [x, scale, zero], name="there")
    back = ir.node("DequantizeLinear", [there.outputs[0], scale, zero], name="back")
    there.outputs[0].name, back.outputs[0].name = "q", "y"
    back.outputs[0].type, back.outputs[0].shape = x.type, x.shape
    both = ir.Graph(
        [x], back.outputs, nodes=[there, back], initializers=[scale, zero], opset_imports={"": 17}
    )
    feed = {"x": np.linspace(-10, 10, ELEMENTS, dtype=np.float32)}
    kernels = profile_kernels(ir.Model(both, ir_version=8), feed, seconds=0)
    return Cost(max(sum(kernel.ms for kernel in kernels) / 2, LEAST_MS), 1.0)

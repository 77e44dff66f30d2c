"""Which kernels onnxruntime really runs a model with: in integers or not, why, and how long each
takes on this CPU.
"""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from quant_core.evaluate.float_reasons import (
    has_integers,
    multiplies_by_weight,
    unpacked_weights,
    why_float,
)
from quant_core.model import graph
from quant_core.model.normalize import load_normalized, normalize
from quant_core.model.session import Feed, open_profiled, optimized_graph, run

MIN_RUNS = 5  # that are timed,
FEWEST_RUNS = 2  # or these, once so many seconds are over:
PATIENCE_S = 0.5
BLOCKED_SUFFIX = "_nchwc"  # of the names of kernels that write the blocked layout
ADDED_TO_CONV = 3  # the input of a kernel of that layout that it adds to its product
NHWC_SUFFIX = re.compile(r"_token_\d+$")
KERNEL_SUFFIX = "_kernel_time"  # of the names in onnxruntime's profile
# Of a call in that profile, which has one on each line: a loop makes 10,000 of them, alike but for
# their times, and to parse all as JSON takes longer than to run them.
CALL = re.compile(rf'"dur" :(\d+),.*"name" :"(.*?){KERNEL_SUFFIX}"')


class Arithmetic(StrEnum):
    """What a kernel computes with."""

    INT8 = "int8"
    BLOCKS = "blocks of integers"  # of 4 or 8 bits, unpacked while it multiplies
    CONVERSION = "conversion"  # between integers and float
    FLOAT32 = "float32"
    FLOAT16 = "float16"
    FLOAT64 = "float64"
    INDICES = "indices"  # shapes, ids, masks, strings


CONVERSIONS = {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "Cast"}
# What quantizes a float input itself, and so computes in int8 though its first input is float.
SELF_QUANTIZING = {"DynamicQuantizeMatMul", "DynamicQuantizeLSTM"}
SIZES = {"Shape", "Size"}  # which look at no value of their input
BLOCK_KERNELS = {"MatMulNBits", "GatherBlockQuantized"}
OF_TYPE = {
    "int8": Arithmetic.INT8,
    "uint8": Arithmetic.INT8,
    "float": Arithmetic.FLOAT32,
    "float16": Arithmetic.FLOAT16,
    "double": Arithmetic.FLOAT64,
}
FLOATS = {Arithmetic.FLOAT32, Arithmetic.FLOAT16, Arithmetic.FLOAT64}


@dataclass(frozen=True, slots=True)
class Kernel:
    """One kernel of the graph as onnxruntime runs it.

    op_type     of the kernel: fused operators have names of their own
    arithmetic  what it computes with
    ms          time of one run: the least of all runs, as others on the machine only ever add time
    covers      names of the file's nodes that it stands for, as far as tensors' names tell
    has_weight  whether one of these multiplies by a weight
    why         why it computes in float; "" if it does not
    """

    name: str
    op_type: str
    arithmetic: Arithmetic
    ms: float
    covers: tuple[str, ...] = ()
    has_weight: bool = False
    why: str = ""


@dataclass(slots=True)
class _Timed:
    """What the profile says of one kernel, call by call; a loop calls it several times a run."""

    op_type: str
    input_types: list[str]
    microseconds: list[float] = field(default_factory=list)
    output_types: list[str] = field(default_factory=list)


def profile_kernels(
    source: Path | ir.Model,
    feed: Feed,
    *,
    threads: int = 1,
    seconds: float,
    normalized: ir.Model | None = None,
) -> list[Kernel]:
    """The kernels of a model, in the order in which they run.

    feed        what it is run on, over and over for `seconds`, at least MIN_RUNS times, or fewer if
                these take much longer
    normalized  the model in its normal form, from callers that have it

    Raises: ModelError if the model does not load, or does not run on the feed.
    """
    timed, runs = _profile(source, feed, threads, seconds)
    model = _normal_form(source) if normalized is None else normalized
    is_quantized = has_integers(model)
    unpacked = unpacked_weights(model)
    covered = _covered_nodes(optimized_graph(source), model)
    kernels = []
    for name, found in timed.items():
        nodes = covered.get(name, ())
        arithmetic = arithmetic_of(found.op_type, found.input_types, found.output_types)
        why = ""
        if arithmetic in FLOATS:
            why = why_float(found.op_type, nodes, unpacked, is_quantized=is_quantized)
        kernels.append(
            Kernel(
                name=name,
                op_type=found.op_type,
                arithmetic=arithmetic,
                ms=_least_ms(found.microseconds, runs),
                covers=tuple(str(node.name) for node in nodes),
                has_weight=any(map(multiplies_by_weight, nodes)),
                why=why,
            )
        )
    return kernels


def arithmetic_of(
    op_type: str, input_types: Iterable[str], output_types: Iterable[str]
) -> Arithmetic:
    """What a kernel computes with, from its operator and its tensors' types in onnxruntime's words.

    >>> arithmetic_of("QLinearConv", ["uint8", "float", "uint8"], ["uint8"])
    <Arithmetic.INT8: 'int8'>
    """
    if op_type in CONVERSIONS:
        return Arithmetic.CONVERSION
    if op_type in BLOCK_KERNELS:
        return Arithmetic.BLOCKS
    if op_type in SELF_QUANTIZING:
        return Arithmetic.INT8
    if op_type in SIZES:
        return Arithmetic.INDICES
    first = next(iter(input_types), "")
    for kind in (first, *output_types):
        if kind in OF_TYPE:
            return OF_TYPE[kind]
    return Arithmetic.INDICES


def _normal_form(source: Path | ir.Model) -> ir.Model:
    if isinstance(source, Path):
        return load_normalized(source)
    model = source.clone()
    normalize(model)
    return model


def _profile(
    model: Path | ir.Model, feed: Feed, threads: int, seconds: float
) -> tuple[dict[str, _Timed], int]:
    """The kernels by name in the order of their first run, and the number of runs."""
    with tempfile.TemporaryDirectory(prefix="quantmill-") as folder:
        session = open_profiled(model, Path(folder, "profile"), threads=threads)
        run(session, feed)  # the first run allocates memory
        began_at, runs = time.perf_counter(), 0
        while not _is_enough(runs, time.perf_counter() - began_at, seconds):
            run(session, feed)
            runs += 1
        return _calls(Path(session.end_profiling())), runs


def _is_enough(runs: int, spent_s: float, seconds: float) -> bool:
    wanted = FEWEST_RUNS if spent_s >= PATIENCE_S else MIN_RUNS
    return runs >= wanted and spent_s >= seconds


def _calls(profile: Path) -> dict[str, _Timed]:
    """What onnxruntime's profile says of each kernel, by name, in the order of their first call."""
    timed: dict[str, _Timed] = {}
    kernels: dict[str, _Timed] = {}  # by their names as JSON escapes them
    with profile.open(encoding="utf-8") as lines:
        for line in lines:
            call = CALL.search(line)
            if call is None:
                continue
            microseconds, escaped = call.groups()
            if escaped not in kernels:
                event = json.loads(line.rstrip().rstrip(","))
                details = event["args"]
                kernels[escaped] = timed[event["name"].removesuffix(KERNEL_SUFFIX)] = _Timed(
                    details["op_name"],
                    _types(details["input_type_shape"]),
                    output_types=_types(details["output_type_shape"]),
                )
            kernels[escaped].microseconds.append(int(microseconds))
    return timed


def _least_ms(microseconds: list[float], runs: int) -> float:
    """The least time of one run, without the first, which allocates memory; the mean where runs
    differ in their calls.
    """
    calls, rest = divmod(len(microseconds), runs + 1)
    if rest:
        return sum(microseconds) / (runs + 1) / 1e3
    each = [sum(microseconds[i * calls : (i + 1) * calls]) for i in range(1, runs + 1)]
    return min(each) / 1e3


def _types(described: Iterable[Mapping[str, Any]]) -> list[str]:
    """The types of [{"uint8": [1, 3]}, ...]."""
    return [next(iter(tensor), "") for tensor in described]


def _covered_nodes(optimized: onnx.ModelProto, model: ir.Model) -> dict[str, tuple[ir.Node, ...]]:
    """Node of the optimized graph -> the nodes of the file that it stands for: those that lie
    between its outputs and the tensors that other kernels make.
    """
    values = {str(value.name): value for node in model.graph for value in node.outputs}
    original_name = _original_names(optimized, model)
    made = set(original_name.values())
    covered = {}
    for node in optimized.graph.node:
        ahead = [original_name[name] for name in node.output]
        outputs = set(ahead)
        inputs = {original_name.get(name, name) for name in node.input}
        found: dict[ir.Node, None] = {}
        while ahead:
            name = ahead.pop()
            is_end = name in inputs or (name in made and name not in outputs)
            producer = values[name].producer() if name in values and not is_end else None
            if producer is not None and producer not in found:
                found[producer] = None
                ahead += [str(value.name) for value in producer.inputs if value is not None]
        covered[node.name] = tuple(reversed(found))
    return covered


def _original_names(optimized: onnx.ModelProto, model: ir.Model) -> dict[str, str]:
    """Tensor that a kernel makes -> its name in the file.

    A tensor that survives keeps it. Kernels of another layout make tensors of new names: in the
    blocked one the kernel is called after the old (`NAME_nchwc`), and a Conv that adds a tensor to
    its product after that product; in NHWC it is called after the node.
    """
    first_output = {str(node.name): str(node.outputs[0].name) for node in model.graph}
    kept = {str(value.name): value for node in model.graph for value in node.outputs}
    found: dict[str, str] = {}
    for node in optimized.graph.node:
        blocked = node.name.removesuffix(BLOCKED_SUFFIX)
        lent = first_output.get(NHWC_SUFFIX.sub("", node.name), blocked)
        if blocked in kept and blocked != node.name and any(node.input[ADDED_TO_CONV:]):
            lent = _behind_sum(node, kept[blocked])
        found |= {name: name if name in kept else lent for name in node.output}
    return found


def _behind_sum(kernel: onnx.NodeProto, product: ir.Value) -> str:
    """The sum that a blocked Conv makes of its product and another tensor, or the activation that
    it applies to that.
    """
    value = product
    for _ in range(1 + any(attribute.name == "activation" for attribute in kernel.attribute)):
        consumers = graph.consumers(value)
        if len(consumers) == 1:
            value = consumers[0].outputs[0]
    return str(value.name)

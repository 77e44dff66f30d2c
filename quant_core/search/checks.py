"""Checks before work begins: of the output path, of a given plan, of two models' interfaces."""

from __future__ import annotations

import os
from pathlib import Path

import onnx_ir as ir
import onnxruntime as ort

from quant_core.data.samples import Samples
from quant_core.errors import ModelError, RequestError, reason_of
from quant_core.model import files, graph
from quant_core.model.atomic import check_replaceable
from quant_core.plan.static_nodes import data_inputs
from quant_core.plan.types import Compute, QuantPlan


def check_output(path: str | Path, output: str | Path) -> Path:
    """The output path, whose folder now exists.

    Raises: RequestError if the output is the model `path` or holds its external data, is a folder
        or a device, or cannot be written; ModelError if there is an output, and the model cannot be
        read.
    """
    path, output = Path(path), Path(output)
    try:
        check_replaceable(output)
    except OSError as error:
        raise RequestError(reason_of(error), str(output), "Choose another output") from error
    if output.is_file():
        external = {Path(t.base_dir, t.location) for t in files.external_tensors(files.load(path))}
        if any(output.samefile(file) for file in (path, *external)):
            problem = "the output is also an input, which is never changed"
            raise RequestError(problem, str(output), "Choose another output")
    if output.is_dir():
        raise RequestError("is a folder", str(output), "Name a file in it")
    folder = output.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        problem = f"the folder cannot be made: {reason_of(error)}"
        raise RequestError(problem, str(folder), "Choose another") from error
    if not os.access(folder, os.W_OK):
        raise RequestError(
            "the folder cannot be written to", str(folder), "Choose another or change its rights"
        )
    return output


def check_plan(model: ir.Model, plan: QuantPlan, samples: Samples | None) -> None:
    """Checks that a given plan can be followed.

    Raises: RequestError if it names nodes or tensors that the prepared model lacks, has a static
    node without the activations that this reads, or needs ranges and there are no samples to
    measure them on.
    """
    nodes = list(graph.nodes_of(model))
    tensors = {value.name for value in model.graph.inputs}
    tensors |= {value.name for node in nodes for value in node.outputs}
    unknown = {planned.node for planned in plan.nodes} - {node.name for node in nodes}
    unknown |= {*plan.activations, *plan.means, *plan.outliers} - tensors
    if unknown:
        problem = f"is of another model: this one has no {min(unknown)}"
        raise RequestError(problem, "plan", "Plan this model anew")
    static = {planned.node for planned in plan.nodes if planned.compute is Compute.STATIC}
    for node in nodes:
        read = [str(v.name) for v in data_inputs(node)] if node.name in static else []
        lacking = next((name for name in read if name not in plan.activations), None)
        if lacking is not None:
            problem = f"has node {node.name} static, and no activation {lacking}, which it reads"
            raise RequestError(problem, "plan", f'Add "{lacking}": "{lacking}" to its activations')
    if plan.activations and samples is None:
        raise RequestError(
            "has static nodes, which need calibration", "plan", "Give the data that they are to fit"
        )


def check_same_interface(
    original: ort.InferenceSession, quantized: ort.InferenceSession, where: str | Path
) -> None:
    """Raises: ModelError unless both models have inputs and outputs of the same names."""
    pairs = {
        "inputs": (original.get_inputs(), quantized.get_inputs()),
        "outputs": (original.get_outputs(), quantized.get_outputs()),
    }
    for kind, (expected, found) in pairs.items():
        expected_names = [value.name for value in expected]
        found_names = [value.name for value in found]
        if found_names != expected_names:
            problem = (
                f"has {kind} {', '.join(found_names)}, its original {', '.join(expected_names)}"
            )
            raise ModelError(problem, str(where), "Not the same model")

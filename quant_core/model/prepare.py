"""How a model becomes fit to be planned: constants folded, batch norms folded, an opset that has what we write."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common as passes

from quant_core.errors import ModelError
from quant_core.model import graph
from quant_core.model.fuse_hard_sigmoid import fuse_gates
from quant_core.model.session import open_session, run, write_optimized

OPSET_QDQ = 13  # per-channel DequantizeLinear
OPSET_RAISED = 17  # what an older model is raised to
OPSET_INT4 = 21  # 4-bit types and blocks
CONVERTER_BYTES = 1024  # tensors up to this size may be axes or shapes, which it must see
SAME_DB = 50.0  # below this, folding changed more than float32 rounding explains


def prepare(path: str | Path, samples: Iterable[Mapping[str, NDArray[Any]]] = ()) -> ir.Model:
    """A model that computes the same with fewer nodes, normalized and ready for `make_plan`.

    1. An opset below 13 is raised to 17 with ONNX's version converter.
    2. onnxruntime's BASIC optimizer folds constants and batch norms; its output stays portable ONNX.
    3. Gates that are spelled out become HardSigmoids (gates.py).
    4. A Pad before a Conv that the optimizer leaves alone stays one: merged, the Conv may be slower.
    5. Where the outputs on `samples` differ by more than rounding, the model stays unfolded (metadata says so).

    Raises: ModelError if the file is not a model, is quantized already, or its opset cannot be raised.
    """
    path = Path(path)
    model = graph.load(path)
    if graph.is_quantized(model):
        raise ModelError(
            "the model is quantized already", str(path), "Start from its float original"
        )
    raised = raise_opset(model, OPSET_RAISED, path) if graph.opset(model) < OPSET_QDQ else model
    folded = graph.normalize(_optimized(path if raised is model else raised))
    fuse_gates(folded)
    worst = _least_sqnr(path, folded, samples)
    passes.DeduplicateHashedInitializersPass()(folded)
    passes.RemoveUnusedOpsetsPass()(folded)
    _keep_pads(folded)
    folded.graph.opset_imports.setdefault("", graph.opset(raised))
    if worst < SAME_DB:
        kept = graph.normalize(raised)
        kept.metadata_props["quantmill.prepared"] = (
            f"unfolded: folding changed the outputs to {worst:.0f} dB"
        )
        return kept
    return folded


def raise_opset(model: ir.Model, version: int, where: str | Path = "") -> ir.Model:
    """The model at that opset, converted (not just renumbered), with an IR version that allows it.

    Raises: ModelError naming the operator that cannot be converted.
    """
    if graph.opset(model) >= version:
        model.ir_version = max(model.ir_version, 10 if version >= OPSET_INT4 else 8)
        return model
    try:
        raised = _converted(model, version)
    except Exception as error:  # the converter raises RuntimeError and its own ConvertError
        raise ModelError(
            f"opset {graph.opset(model)} cannot be raised to {version}: {str(error).strip().splitlines()[-1][:200]}",
            str(where), f"Export the model with opset {version} or newer",
        ) from error  # fmt: skip
    raised.ir_version = max(model.ir_version, 10 if version >= OPSET_INT4 else 8)
    return raised


def _converted(model: ir.Model, version: int) -> ir.Model:
    """By ONNX's converter, for which large tensors are inputs: no operator asks what they hold, and none is copied."""
    copy = model.clone()
    held = {}
    for name, value in list(copy.graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or value.is_graph_input():
            continue
        if tensor.nbytes > CONVERTER_BYTES:
            held[name], value.const_value = tensor, None
            value.shape, value.type = ir.Shape(tensor.shape.numpy()), ir.TensorType(tensor.dtype)
            del copy.graph.initializers[name]
            copy.graph.inputs.append(value)
        elif isinstance(tensor, ir.ExternalTensor):
            value.const_value = ir.tensor(tensor.numpy(), name=name)
    raised = ir.from_proto(onnx.version_converter.convert_version(ir.to_proto(copy), version))
    for value in [v for v in raised.graph.inputs if v.name in held]:
        raised.graph.inputs.remove(value)
        value.const_value = held[str(value.name)]
        raised.graph.register_initializer(value)
    return raised


def _optimized(model: Path | ir.Model) -> ir.Model:
    """What onnxruntime's BASIC optimizer makes of it; tensors of a large model stay in a file that goes with them."""
    folder = _Folder()
    folded = ir.load(write_optimized(model, folder.path, optimize="basic"))
    if not graph.is_large(folded):
        return ir.external_data.load_to_model(folded)
    for tensor in graph.external_tensors(folded):
        tensor.meta["folder"] = folder
    return folded


def _keep_pads(model: ir.Model) -> None:
    """Rule 4: onnxruntime, which would merge them when it loads the model again, leaves a Conv with auto_pad alone."""
    for node in (n for g in graph.graphs_of(model) for n in g if n.op_type == "Conv"):
        before = graph.value(node.inputs[0]).producer()
        zeros = (
            not any(graph.attribute(node, "pads", ()))
            and graph.attribute(node, "auto_pad", "NOTSET") == "NOTSET"
        )
        if before is not None and before.op_type == "Pad" and zeros:
            node.attributes.pop("pads", None)
            node.attributes["auto_pad"] = ir.AttrString("auto_pad", "VALID")


class _Folder:
    """A folder that is gone when nothing holds this any more."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="quantmill-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


def _least_sqnr(
    before: Path, after: ir.Model, samples: Iterable[Mapping[str, NDArray[Any]]]
) -> float:
    """The worst signal-to-noise ratio over the float outputs, in dB; inf without samples. One is loaded at a time."""
    feeds, outputs = list(samples), []
    for model in (before, after):
        session = open_session(model)
        outputs.append([x for feed in feeds for x in run(session, feed, str(before))])
        del session
    worst = np.inf
    for a, b in zip(*outputs, strict=True):
        if isinstance(a, np.ndarray) and a.dtype.kind == "f" and a.size and np.isfinite(a).all():
            noise = float(np.sum((a.astype(np.float64) - b) ** 2))
            power = float(np.sum(a.astype(np.float64) ** 2))
            if noise > 1e-12 * a.size:  # absolute: outputs near zero have no meaningful ratio
                worst = min(worst, 10 * np.log10(max(power, 1e-300) / noise))
    return worst

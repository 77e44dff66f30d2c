"""How a model becomes fit to be planned: constants folded, batch norms folded, an opset that has what we write."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common as passes

from quant_core import graph
from quant_core.errors import ModelError
from quant_core.session import open_session, optimized_graph, run

OPSET_QDQ = 13  # per-channel DequantizeLinear
OPSET_RAISED = 17  # what an older model is raised to
OPSET_INT4 = 21  # 4-bit types and blocks
SAME_DB = 50.0  # below this, folding changed more than float32 rounding explains


def prepare(path: str | Path, samples: Iterable[Mapping[str, NDArray[Any]]] = ()) -> ir.Model:
    """A model that computes the same with fewer nodes, normalized and ready for `make_plan`.

    1. An opset below 13 is raised to 17 with ONNX's version converter.
    2. onnxruntime's BASIC optimizer folds constants and batch norms; its output stays portable ONNX.
    3. Where the outputs on `samples` differ by more than rounding, the model stays unfolded (metadata says so).

    Raises: ModelError if the file is not a model, is quantized already, or its opset cannot be raised.
    """
    path = Path(path)
    model = graph.load(path)
    if graph.is_quantized(model):
        raise ModelError("the model is quantized already", str(path), "Start from its float original")
    raised = raise_opset(model, OPSET_RAISED, path) if graph.opset(model) < OPSET_QDQ else model
    source: str | Path | bytes = path if raised is model else ir.to_proto(raised).SerializeToString()
    optimized = optimized_graph(source, optimize="basic")
    folded = graph.normalize(ir.from_proto(optimized))
    worst = _least_sqnr(path, optimized.SerializeToString(), samples)
    passes.DeduplicateInitializersPass()(folded)
    passes.RemoveUnusedOpsetsPass()(folded)
    folded.graph.opset_imports.setdefault("", graph.opset(raised))
    if worst < SAME_DB:
        kept = graph.normalize(raised)
        kept.metadata_props["quantmill.prepared"] = f"unfolded: folding changed the outputs to {worst:.0f} dB"
        return kept
    return folded


def raise_opset(model: ir.Model, version: int, where: str | Path = "") -> ir.Model:
    """The model at that opset, converted (not just renumbered), with an IR version that allows it.

    Raises: ModelError naming the operator that cannot be converted, or a model too large for the converter.
    """
    if graph.opset(model) >= version:
        model.ir_version = max(model.ir_version, 10 if version >= OPSET_INT4 else 8)
        return model
    if is_large(model):
        raise ModelError(
            f"opset {graph.opset(model)} must become {version}, but ONNX's converter cannot take models above 2 GB",
            str(where), f"Export the model with opset {version} or newer",
        )  # fmt: skip
    try:
        proto = onnx.version_converter.convert_version(ir.to_proto(model), version)
    except Exception as error:  # the converter raises RuntimeError and its own ConvertError
        raise ModelError(
            f"opset {graph.opset(model)} cannot be raised to {version}: {str(error).strip().splitlines()[-1][:200]}",
            str(where), f"Export the model with opset {version} or newer",
        ) from error  # fmt: skip
    raised = ir.from_proto(proto)
    raised.ir_version = max(model.ir_version, 10 if version >= OPSET_INT4 else 8)
    return raised


def is_large(model: ir.Model) -> bool:
    """Whether the weights come near what one protobuf message can hold (2 GB)."""
    return (
        sum(v.const_value.nbytes for g in graph.graphs_of(model) for v in g.initializers.values() if v.const_value)
        > 1.9e9
    )


def _least_sqnr(before: Path, after: bytes, samples: Iterable[Mapping[str, NDArray[Any]]]) -> float:
    """The worst signal-to-noise ratio over the float outputs, in dB; inf without samples."""
    worst, first, second = np.inf, open_session(before), open_session(after)
    for feed in samples:
        for a, b in zip(run(first, feed, str(before)), run(second, feed, str(before)), strict=True):
            if isinstance(a, np.ndarray) and a.dtype.kind == "f" and a.size and np.isfinite(a).all():
                noise = float(np.sum((a.astype(np.float64) - b) ** 2))
                power = float(np.sum(a.astype(np.float64) ** 2))
                if noise > 1e-12 * a.size:  # absolute: outputs near zero have no meaningful ratio
                    worst = min(worst, 10 * np.log10(max(power, 1e-300) / noise))
    return worst

"""How a model becomes fit to be planned: constants and batch norms folded, in a usable opset."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common as passes

from quant_core.errors import ModelError
from quant_core.model import files, graph
from quant_core.model.carried import insert_identities
from quant_core.model.compact import keep_compact
from quant_core.model.deduplicate import deduplicate
from quant_core.model.fix_shape import fix_shapes, state_known_sizes
from quant_core.model.fuse_hard_sigmoid import fuse_hard_sigmoid
from quant_core.model.names import make_unique, rename_folded
from quant_core.model.normalize import fix_weights, normalize
from quant_core.model.opset import lower_opset, raise_opset
from quant_core.model.origins import record_origins
from quant_core.model.qat import REPLACE, RESPECT, handle_pairs
from quant_core.model.restore_interface import restore_interface
from quant_core.model.session import Feed, open_session, run, write_optimized
from quant_core.model.spill import HeldFolder
from quant_core.model.to_float32 import to_float32
from quant_core.numerics.sqnr import difference_db

OPSET_QDQ = 13  # the first with a per-channel DequantizeLinear
OPSET_RAISED = 17  # what an older model is raised to
STAYS_FLOAT = "quantmill.stays_float"  # key in the metadata of a model prepared without integers
SAME_DB = 50.0  # below this, folding changed more than float32 rounding explains
NO_NOISE = 1e-12  # mean square error of outputs near zero, where a ratio means nothing
NO_SIZES: Mapping[str, int] = MappingProxyType({})
SAME_AS_HALF_DB = 25.0  # the same of a model that rounds every result to 11 or 8 bits


def prepare(
    path: str | Path,
    samples: Iterable[Feed] = (),
    *,
    qat: str = RESPECT,
    sizes: Mapping[str, int] = NO_SIZES,
    stays_float: bool = False,
) -> ir.Model:
    """A model that computes the same with fewer nodes, normalized and ready for `make_plan`.

    qat          what becomes of the pairs of quantization-aware training (qat.py)
    sizes        of the inputs that are fixed (fix_shape.py); the samples have them
    stays_float  whether no weight is going to be stored in integers

    1. Weights that are inputs with a default value are constants (normalize.py). A model whose
       weights are float16, bfloat16 or double computes in float32 (to_float32.py).
    2. An opset below 13 is raised to 17 with ONNX's version converter.
    3. onnxruntime's BASIC optimizer folds constants and batch norms; its output is portable ONNX.
       It leaves nodes alone that quantize and dequantize. Constants that nodes made of fewer bytes
       are made by these again (compact.py). What it made has names that it does not give again
       when the model is loaded (names.py).
    4. An opset above 25 becomes 25 if none of the operators has changed since: onnxruntime has no
       kernels yet that quantize in later ones.
    5. Hard sigmoids that are spelled out become HardSigmoid (fuse_hard_sigmoid.py).
    6. If the outputs on `samples` differ by more than rounding, the model stays unfolded, and its
       metadata says so.
    7. A Pad before a Conv that the optimizer did not merge stays a Pad: merged, the Conv may be
       slower.
    8. Its interface is that of the file, with the sizes that are fixed and what follows from them.
       Its metadata tells which of the file's nodes each node stands for (origins.py).

    Raises: RequestError as `fix_shapes`; ModelError if the file is not a model, if its opset cannot
    be raised, or if its outputs on `samples` need double.
    """
    path = Path(path)
    model = files.load(path)
    former = make_unique(model)
    is_fixed = fix_weights(model.graph) or bool(sizes)
    fix_shapes(model.graph, sizes)
    original = model.clone()
    source: Path | ir.Model = path
    converted = to_float32(model)  # 1
    is_trained = handle_pairs(model, qat)
    if former or is_fixed or converted or is_trained:
        source = model
    if graph.opset(model) < OPSET_QDQ:
        source = model = raise_opset(model, OPSET_RAISED, path)  # 2
    folded = _optimized(source)  # 3
    rename_folded(folded, model)
    keep_compact(folded, model, stays_float=stays_float)
    normalize(folded)
    lower_opset(folded)  # 4
    inferred = {str(v.name): v.shape for v in folded.graph.outputs}
    fuse_hard_sigmoid(folded)  # 5
    feeds = list(samples)
    lost_pairs = is_trained and qat == REPLACE  # without them it computes something else
    problem = "" if lost_pairs else _changed_outputs(path, folded, feeds, converted)  # 6
    if problem:
        normalize(model)
        model.metadata_props["quantmill.prepared"] = f"unfolded: {problem}"
        return model
    deduplicate(folded)
    passes.RemoveUnusedOpsetsPass()(folded)
    _keep_pads(folded)  # 7
    folded.graph.opset_imports.setdefault("", graph.opset(model))
    restore_interface(folded, original)  # 8
    if sizes:
        state_known_sizes(folded.graph, inferred)
    insert_identities(folded)
    record_origins(folded, original, former)
    if stays_float:
        folded.metadata_props[STAYS_FLOAT] = "true"
    return folded


def _optimized(model: Path | ir.Model) -> ir.Model:
    """The model after onnxruntime's BASIC optimizer; tensors of a large one stay in a file.

    The file is removed with the last of these tensors.
    """
    folder = HeldFolder()
    folded = files.read(write_optimized(model, folder.path, optimize="basic"))
    if not files.is_large(folded):
        return ir.external_data.load_to_model(folded)
    for tensor in files.external_tensors(folded):
        tensor.meta["folder"] = folder
    return folded


def _keep_pads(model: ir.Model) -> None:
    """Edit in place (rule 7): a Conv with zero pads after a Pad gets auto_pad = VALID.

        Pad -> Conv(pads = 0)  =  Pad -> Conv(auto_pad = VALID)

    onnxruntime merges a Pad into the Conv when it loads the model, unless the Conv has an auto_pad.
    """
    for node in graph.nodes_of(model, "Conv"):
        if _is_unpadded(node) and _follows_pad(node):
            node.attributes.pop("pads", None)
            node.attributes["auto_pad"] = ir.AttrString("auto_pad", "VALID")


def _is_unpadded(conv: ir.Node) -> bool:
    auto_pad = graph.attribute(conv, "auto_pad", "NOTSET")
    return auto_pad == "NOTSET" and not any(graph.attribute(conv, "pads", ()))


def _follows_pad(node: ir.Node) -> bool:
    before = graph.value(node.inputs[0]).producer()
    return before is not None and before.op_type == "Pad"


def _changed_outputs(
    path: Path,
    folded: ir.Model,
    feeds: list[Feed],
    converted: Collection[ir.DataType],
) -> str:
    """How far folding changed the outputs of the file, "" if no further than rounding does.

    converted  the types that became float32

    Raises: ModelError if the model was in double, and its outputs need that.
    """
    if converted and not feeds:
        return ""  # the file need not load: what has no kernel in bfloat16 has one in float32
    worst_db = _least_sqnr_db(path, folded, feeds)
    if ir.DataType.DOUBLE in converted and worst_db < SAME_DB:
        raise ModelError(
            f"needs double: computed in float32, its outputs change to {worst_db:.0f} dB",
            str(path),
            "Scale its inputs, or leave it as it is",
        )
    is_same = worst_db >= (SAME_AS_HALF_DB if converted else SAME_DB)
    return "" if is_same else f"folding changed the outputs to {worst_db:.0f} dB"


def _least_sqnr_db(before: Path, after: ir.Model, feeds: Sequence[Feed]) -> float:
    """What the worst float output is worth as a copy of the original's in dB; inf without feeds.

    Only one of the two sessions exists at a time.
    """
    expected = _outputs(before, feeds, str(before))
    changed = _outputs(after, feeds, str(before))
    pairs = zip(expected, changed, strict=True)
    found = (difference_db(a, b, NO_NOISE) for a, b in pairs if a.dtype.kind == "f")
    return min(found, default=math.inf)


def _outputs(model: Path | ir.Model, feeds: Sequence[Feed], where: str) -> list[NDArray[Any]]:
    """The outputs for all feeds, one after another."""
    session = open_session(model, packed=False)
    return [output for feed in feeds for output in run(session, feed, where)]

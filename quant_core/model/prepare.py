"""How a model becomes fit to be planned: constants and batch norms folded, in a usable opset."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common as passes

from quant_core.errors import ModelError
from quant_core.model import files, graph, old_scan
from quant_core.model.carried import set_apart
from quant_core.model.compact import keep_compact
from quant_core.model.fix_shape import fix_shapes, state_known_sizes
from quant_core.model.fuse_hard_sigmoid import fuse_hard_sigmoid
from quant_core.model.names import make_unique
from quant_core.model.normalize import fix_weights, normalize
from quant_core.model.origins import record_origins
from quant_core.model.proto import from_proto, to_proto
from quant_core.model.qat import REPLACE, RESPECT, handle_pairs
from quant_core.model.session import open_session, run, write_optimized
from quant_core.model.to_float32 import to_float32

OPSET_QDQ = 13  # the first with a per-channel DequantizeLinear
OPSET_RAISED = 17  # what an older model is raised to
OPSET_KERNELS = 25  # the newest whose QuantizeLinear onnxruntime computes
OPSET_INT4 = 21  # the first with 4-bit types and blocks
IR_VERSION = 8  # of opset 17
IR_VERSION_INT4 = 10  # of opset 21
CONVERTER_BYTES = 1024  # tensors up to this size may be axes or shapes, which it must see
SHARED_BYTES = 1024  # of a weight that several graphs share
STAYS_FLOAT = "quantmill.stays_float"  # key in the metadata of a model prepared without integers
SAME_DB = 50.0  # below this, folding changed more than float32 rounding explains
NO_SIZES: Mapping[str, int] = MappingProxyType({})
SAME_AS_HALF_DB = 25.0  # the same of a model that rounds every result to 11 or 8 bits


def prepare(
    path: str | Path,
    samples: Iterable[Mapping[str, NDArray[Any]]] = (),
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
       are made by these again (compact.py).
    4. Hard sigmoids that are spelled out become HardSigmoid (fuse_hard_sigmoid.py).
    5. A Pad before a Conv that the optimizer did not merge stays a Pad: merged, the Conv may be
       slower.
    6. If the outputs on `samples` differ by more than rounding, the model stays unfolded, and its
       metadata says so.
    7. Its interface is that of the file, with the sizes that are fixed and what follows from them.
       Its metadata tells which of the file's nodes each node stands for (origins.py).
    8. An opset above 25 becomes 25 if none of the operators has changed since: onnxruntime has no
       kernels yet that quantize in later ones.

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
    keep_compact(folded, model, stays_float=stays_float)
    normalize(folded)
    _lower_opset(folded)  # 8
    inferred = {str(v.name): v.shape for v in folded.graph.outputs}
    fuse_hard_sigmoid(folded)  # 4
    feeds = list(samples)
    is_checked = bool(feeds) or not converted  # what has no kernel in bfloat16 has one in float32
    if is_trained and qat == REPLACE:
        is_checked = False  # without the pairs it computes something else
    worst_db = _least_sqnr_db(path, folded, feeds) if is_checked else np.inf
    if ir.DataType.DOUBLE in converted and worst_db < SAME_DB:
        raise ModelError(
            f"needs double: computed in float32, its outputs change to {worst_db:.0f} dB",
            str(path),
            "Scale its inputs, or leave it as it is",
        )
    if worst_db < (SAME_AS_HALF_DB if converted else SAME_DB):  # 6
        normalize(model)
        problem = f"unfolded: folding changed the outputs to {worst_db:.0f} dB"
        model.metadata_props["quantmill.prepared"] = problem
        return model
    _deduplicate(folded)
    passes.RemoveUnusedOpsetsPass()(folded)
    _keep_pads(folded)  # 5
    folded.graph.opset_imports.setdefault("", graph.opset(model))
    restore_interface(folded, original)  # 7
    if sizes:
        state_known_sizes(folded.graph, inferred)
    set_apart(folded)
    record_origins(folded, original, former)
    if stays_float:
        folded.metadata_props[STAYS_FLOAT] = "true"
    return folded


def restore_interface(model: ir.Model, original: ir.Model) -> None:
    """Edit `model` in place: what its original says of itself, its inputs and its outputs.

    Converters and optimizers name sizes that were left open, and forget texts and operator sets.
    """
    model.doc_string, model.graph.doc_string = original.doc_string, original.graph.doc_string
    model.graph.name = original.graph.name
    model.graph.metadata_props.update(original.graph.metadata_props)
    for domain, version in original.graph.opset_imports.items():
        model.graph.opset_imports.setdefault(domain, version)
    before = (*original.graph.inputs, *original.graph.outputs)
    known = {value.name: value for value in before}
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.name in known:
            found = known[value.name]
            value.shape, value.doc_string = found.shape, found.doc_string
            value.metadata_props.update(found.metadata_props)
            if value.dtype == found.dtype:
                value.type = found.type  # with its denotation


def _deduplicate(model: ir.Model) -> None:
    """Edit in place: equal constants become one, which all graphs read.

    1. In one graph, whatever they hold.
    2. In several graphs, if they are weights: what they become moves to the main graph.
       onnxruntime wants integers, scales and sizes in the graph that reads them.
    3. A constant that is an output of its graph stays, and the others become it.
    """
    found: dict[tuple[Any, ...], ir.Value] = {}
    for inside in graph.graphs_of(model):
        outputs_first = sorted(inside.initializers.values(), key=lambda v: not v.is_graph_output())
        for value in outputs_first:
            if not graph.is_constant(value) or value.dtype == ir.DataType.STRING:
                continue
            key = _content(value)
            is_shared = graph.is_float_weight(value) and key[1] >= SHARED_BYTES  # 2
            first = found.setdefault(key if is_shared else (*key, inside), value)
            if first is value or value.is_graph_output():  # 3
                continue
            if first.graph is not inside and first.graph is not model.graph:
                _move_to_main(model, first)
            value.replace_all_uses_with(first)
            del inside.initializers[str(value.name)]


def _content(value: ir.Value) -> tuple[Any, ...]:
    """What equal constants have in common: type, bytes, shape and digest."""
    tensor = value.const_value
    assert tensor is not None
    digest = hashlib.blake2b(tensor.tobytes(), digest_size=16).digest()
    files.release(tensor)
    return tensor.dtype, tensor.nbytes, graph.shape_of(value), digest


def _move_to_main(model: ir.Model, value: ir.Value) -> None:
    """Edit in place: a constant of an inner graph becomes one of the main graph."""
    assert isinstance(value.graph, ir.Graph)
    del value.graph.initializers[str(value.name)]
    model.graph.register_initializer(value)


def raise_opset(model: ir.Model, version: int, where: str | Path = "") -> ir.Model:
    """A new model at that opset, or at its own if that is newer; `model` is not changed.

    Operators are converted, not just renumbered, and the IR version allows the opset.

    Raises: ModelError, about `where`, naming the operator that cannot be converted.
    """
    if graph.opset(model) >= version:
        raised = model.clone()
    else:
        try:
            raised = _converted(model, version)
        except ModelError:
            raise
        except Exception as error:  # the converter raises RuntimeError and its own ConvertError
            reason = str(error).strip().splitlines()[-1][:200]
            raise ModelError(
                f"opset {graph.opset(model)} cannot be raised to {version}: {reason}",
                str(where),
                f"Export the model with opset {version} or newer",
            ) from error
    least = IR_VERSION_INT4 if version >= OPSET_INT4 else IR_VERSION
    raised.ir_version = max(model.ir_version, least)
    return raised


def _converted(model: ir.Model, version: int) -> ir.Model:
    """The model converted by ONNX's converter, which never copies its large tensors.

    They are inputs while it works: no operator depends on their content.
    """
    copy = model.clone()
    held = _hold_large_tensors(copy)
    raised = from_proto(old_scan.convert(to_proto(copy), version))
    for before, after in zip(model.graph.outputs, raised.graph.outputs, strict=True):
        after.shape = before.shape  # the converter names sizes that are not known
    for value in list(raised.graph.inputs):
        if value.name in held:
            raised.graph.inputs.remove(value)
            value.const_value = held[value.name]
            raised.graph.register_initializer(value)
    restore_interface(raised, model)
    return raised


def _hold_large_tensors(model: ir.Model) -> dict[str, ir.TensorProtocol]:
    """Edit in place: large initializers become inputs. Returns their tensors by name."""
    held = {}
    for name, value in list(model.graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or value.is_graph_input():
            continue
        if tensor.nbytes > CONVERTER_BYTES:
            held[name] = tensor
            value.const_value = None
            value.shape = ir.Shape(tensor.shape.numpy())
            value.type = ir.TensorType(tensor.dtype)
            del model.graph.initializers[name]
            model.graph.inputs.append(value)
        elif isinstance(tensor, ir.ExternalTensor):
            value.const_value = ir.tensor(tensor.numpy(), name=name)
    return held


def _lower_opset(model: ir.Model) -> None:
    """Edit in place (rule 8): the number alone, which changes no operator of the model."""
    version = graph.opset(model)
    if version <= OPSET_KERNELS:
        return
    nodes = [node for inside in graph.graphs_of(model) for node in inside if not node.domain]
    try:
        since = [onnx.defs.get_schema(n.op_type, version).since_version for n in nodes]
    except onnx.defs.SchemaError:
        return  # newer than this onnx, which cannot tell
    if max(since, default=0) <= OPSET_KERNELS:
        model.graph.opset_imports[""] = OPSET_KERNELS


def _optimized(model: Path | ir.Model) -> ir.Model:
    """The model after onnxruntime's BASIC optimizer; tensors of a large one stay in a file.

    The file is removed with the last of these tensors.
    """
    folder = _Folder()
    folded = files.read(write_optimized(model, folder.path, optimize="basic"))
    if not files.is_large(folded):
        return ir.external_data.load_to_model(folded)
    for tensor in files.external_tensors(folded):
        tensor.meta["folder"] = folder
    return folded


def _keep_pads(model: ir.Model) -> None:
    """Edit in place (rule 5): a Conv with zero pads after a Pad gets auto_pad = VALID.

        Pad -> Conv(pads = 0)  =  Pad -> Conv(auto_pad = VALID)

    onnxruntime merges a Pad into the Conv when it loads the model, unless the Conv has an auto_pad.
    """
    for inside in graph.graphs_of(model):
        for node in inside:
            if node.op_type == "Conv" and _is_unpadded(node) and _follows_pad(node):
                node.attributes.pop("pads", None)
                node.attributes["auto_pad"] = ir.AttrString("auto_pad", "VALID")


def _is_unpadded(conv: ir.Node) -> bool:
    auto_pad = graph.attribute(conv, "auto_pad", "NOTSET")
    return auto_pad == "NOTSET" and not any(graph.attribute(conv, "pads", ()))


def _follows_pad(node: ir.Node) -> bool:
    before = graph.value(node.inputs[0]).producer()
    return before is not None and before.op_type == "Pad"


class _Folder:
    """A folder that is removed when no tensor holds it any more."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="quantmill-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


def _least_sqnr_db(
    before: Path, after: ir.Model, feeds: Sequence[Mapping[str, NDArray[Any]]]
) -> float:
    """The worst signal-to-quantization-noise ratio of the float outputs in dB; inf without feeds.

    Only one of the two sessions exists at a time.
    """
    expected = _outputs(before, feeds, str(before))
    changed = _outputs(after, feeds, str(before))
    worst = np.inf
    for a, b in zip(expected, changed, strict=True):
        if a.dtype.kind == "f" and a.size and np.isfinite(a).all():
            signal = a.astype(np.float64)
            noise = float(np.sum((signal - b) ** 2))
            power = float(np.sum(signal**2))
            if noise > 1e-12 * a.size:  # absolute: outputs near zero have no meaningful ratio
                worst = min(worst, 10 * np.log10(max(power, 1e-300) / noise))
    return worst


def _outputs(
    model: Path | ir.Model, feeds: Sequence[Mapping[str, NDArray[Any]]], where: str
) -> list[NDArray[Any]]:
    """The outputs for all feeds, one after another."""
    session = open_session(model)
    return [output for feed in feeds for output in run(session, feed, where)]

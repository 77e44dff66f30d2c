"""Models at another opset: raised by ONNX's converter, or lowered where no operator changed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from quant_core.errors import ModelError
from quant_core.model import graph, old_scan
from quant_core.model.proto import from_proto, to_proto
from quant_core.model.restore_interface import restore_interface

OPSET_COORDINATES = 11  # the first whose Resize says which pixels it reads
OPSET_TRAINING_MODE = 14  # the first with this attribute of BatchNormalization
OPSET_INT4 = 21  # the first with 4-bit types and blocks
OPSET_KERNELS = 25  # the newest whose QuantizeLinear onnxruntime computes
IR_VERSION = 8  # of opset 17
IR_VERSION_INT4 = 10  # of opset 21
UNKNOWN = "quantmill.unknown"  # domain of operators that the converter does not know
CONVERTER_BYTES = 1024  # tensors up to this size may be axes or shapes, which it must see


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
    hidden = _hide_unknown(copy)
    trained = _batch_norms_in_training(copy)
    held = _hold_large_tensors(copy)
    raised = from_proto(old_scan.convert(to_proto(copy), version))
    for node in graph.nodes_of(raised):
        if node.domain == UNKNOWN:
            node.domain = ""
        if node.outputs and node.outputs[0].name in trained:
            node.attributes.add(ir.AttrInt64("training_mode", 1))
        if node.op_type == "Resize" and graph.opset(model) < OPSET_COORDINATES:
            _state_coordinates(node)
    for before, after in zip(model.graph.outputs, raised.graph.outputs, strict=True):
        after.shape = before.shape  # the converter names sizes that are not known
    for value in list(raised.graph.inputs):
        if value.name in held:
            raised.graph.inputs.remove(value)
            value.const_value = held[value.name]
            raised.graph.register_initializer(value)
    if hidden:
        del raised.graph.opset_imports[UNKNOWN]
    restore_interface(raised, model)
    _forget_inferred(raised, model)
    return raised


def _hide_unknown(model: ir.Model) -> bool:
    """Edit in place: operators that onnxruntime adds to ONNX's own (SimplifiedLayerNormalization)
    are in a domain that the converter leaves alone. Returns whether there are any.
    """
    nodes = (node for node in graph.nodes_of(model) if not node.domain)
    unknown = [node for node in nodes if not onnx.defs.has(node.op_type)]
    for node in unknown:
        node.domain = UNKNOWN
        model.graph.opset_imports[UNKNOWN] = 1
    return bool(unknown)


def _batch_norms_in_training(model: ir.Model) -> set[str]:
    """The first outputs of batch norms that normalize by their own batch. Edit in place: these have
    none of the outputs that opset 14 took away, unless they are read.

    Before opset 14, a batch norm that has all five outputs is in training; ONNX's converter
    does not know that. Source: ONNX, operators BatchNormalization-9 and BatchNormalization-14.
    """
    if graph.opset(model) >= OPSET_TRAINING_MODE:
        return set()
    found = set()
    for node in graph.nodes_of(model):
        if node.op_type == "BatchNormalization" and len(node.outputs) > 1:
            found.add(str(node.outputs[0].name))
            if not any(v.uses() or v.is_graph_output() for v in node.outputs[3:]):
                node.resize_outputs(3)
    return found


def _state_coordinates(resize: ir.Node) -> None:
    """Edit in place: a Resize that was an Upsample, or a Resize of opset 10, reads its pixels.

    These read x / scale, which ONNX's converter does not say: (x + 0.5) / scale - 0.5 is the
    default of later ones. Of the pixels beside it the nearest is the lower, or the upper where
    onnxruntime makes an image smaller: one that enlarges some axes and shrinks others is two.
    Source: ONNX, operators Upsample-9, Resize-10 and Resize-11.
    """
    resize.attributes.add(ir.AttrString("coordinate_transformation_mode", "asymmetric"))
    scales = graph.constant(resize.inputs[2])
    if scales is None or scales.min() >= 1:
        resize.attributes.add(ir.AttrString("nearest_mode", "floor"))
        return
    resize.attributes.add(ir.AttrString("nearest_mode", "ceil"))
    if scales.max() > 1 and graph.attribute(resize, "mode", "nearest") == "nearest":
        home, name = graph.home(resize), f"{UNKNOWN}.{resize.outputs[0].name}"
        least = graph.initializer(home, f"{name}.least", np.minimum(scales, 1))
        shrink = ir.node("Resize", [*resize.inputs[:2], least], name=name)
        shrink.attributes.update(resize.attributes)
        shrink.outputs[0].name = name
        home.insert_before(resize, shrink)
        resize.replace_input_with(0, shrink.outputs[0])
        resize.replace_input_with(2, graph.initializer(home, f"{name}.most", np.maximum(scales, 1)))
        resize.attributes.add(ir.AttrString("nearest_mode", "floor"))


def _forget_inferred(raised: ir.Model, model: ir.Model) -> None:
    """Edit `raised` in place: no types that the converter inferred and `model` does not state.

    A file states one for every result, which can take more bytes than small weights.
    """
    stated = {value.name for value in _results(model) if value.type is not None}
    for value in _results(raised):
        if value.name not in stated and not value.is_graph_output():
            value.type = value.shape = None


def _results(model: ir.Model) -> Iterator[ir.Value]:
    return (v for node in graph.nodes_of(model) for v in node.outputs)


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


def lower_opset(model: ir.Model) -> None:
    """Edit in place: an opset above OPSET_KERNELS becomes that one, if that changes no operator."""
    version = graph.opset(model)
    if version <= OPSET_KERNELS:
        return
    nodes = [node for node in graph.nodes_of(model) if not node.domain]
    try:
        since = [onnx.defs.get_schema(n.op_type, version).since_version for n in nodes]
    except onnx.defs.SchemaError:
        return  # newer than this onnx, which cannot tell
    if max(since, default=0) <= OPSET_KERNELS:
        model.graph.opset_imports[""] = OPSET_KERNELS
